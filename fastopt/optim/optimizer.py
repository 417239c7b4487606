"""What the fused optimizers share: one native call a step, and where a step goes that no kernel takes."""

import abc
import functools
import numbers

import torch
from torch.compiler import is_compiling
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from .. import _native
from ..reference import KERNEL_DTYPES
from .atomic import state_as_it_was, uninterrupted, values_as_they_were
from .shards import shards_of

_FLAGS = {"amsgrad", "centered", "decoupled_weight_decay", "maximize", "nesterov"}


def _with_hooks_if_any(step):
    """torch wraps every step for hooks and profiling, at a cost of microseconds; this, only where there are any."""
    step_with_hooks = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def call(self, *args, **kwargs):
        needs_hooks = (
            is_compiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        )
        # A subclass's own step is wrapped by torch, and its hooks have run when it calls this one.
        if needs_hooks and type(self).step is call:
            return step_with_hooks(self, *args, **kwargs)
        return step(self, *args, **kwargs) if args or kwargs else step(self)  # unpacking nothing costs 100 ns

    call.hooked = True  # for torch, which would wrap it once more
    return call


class FusedOptimizer(Optimizer):
    """Mixed in before a torch optimizer, it replaces ``step``, and ``zero_grad`` where nobody looks.

    A step takes the first of these roads that is open to it; all have the same meaning:

    1. the kernels: dense tensors of float64, float32, bfloat16 or float16 on the CPU or a CUDA device;
    2. ``reference.py``, in plain torch: such tensors on the CPU where there is no library, and layouts no kernel walks;
    3. torch's own ``step``: sparse and complex gradients, other devices, ``differentiable``, tensor subclasses, CUDA
       without kernels for it, while ``torch.compile`` traces, and under dispatch modes and functorch transforms.

    DTensor parameters take these roads with their local shards, see :mod:`fastopt.optim.shards`.
    A step that fails changes nothing, on the first two roads and on torch's for dense tensors on the CPU; Ctrl-C waits.
    A subclass names its plan (a class of the extension module) and its hyper-parameters, and calls its reference.
    """

    _plan_name = None
    _option_names = ()
    _counts_steps = True
    _plan = None

    @_with_hooks_if_any
    def step(self, closure=None):
        """Perform a single optimization step.

        Args:
            closure: re-evaluates the model and returns the loss, or None.

        Returns:
            What the closure returned, or None.
        """
        if is_compiling():
            return self._torch_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @functools.wraps(Optimizer.zero_grad, updated=())  # for its documentation, and its name in a TypeError
    def zero_grad(self, set_to_none=True):
        # torch marks a range for profiles always, which takes longer than the rest; here only while there is one.
        if not set_to_none or is_compiling() or torch.autograd._profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def _update(self):
        if not self._update_natively():
            self._update_otherwise()

    def _update_natively(self):
        plan = self._plan
        if plan is None:
            library = _native.module()
            if library is None:
                return False
            plan = self._plan = getattr(library, self._plan_name)()
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            return self._step_scaled(plan)
        return plan.step(self.param_groups, self.state)

    def _step_scaled(self, plan):
        """The step with what a ``GradScaler`` leaves to an optimizer made with ``fused=True``."""
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return plan.step(self.param_groups, self.state, *scaling)

    @torch.no_grad()
    def _update_otherwise(self):
        """First steps, whose state must be made, and all that the kernels refuse."""
        shards = shards_of(self)
        if shards is not None:
            shards.step()
            return
        devices = self._devices()
        with uninterrupted():
            if devices is None or ("cuda" in devices and not _native.cuda()):
                self._torch_step()
            else:
                with state_as_it_was(self):
                    self._update_ordinary_tensors("cuda" in devices)

    def _update_ordinary_tensors(self, on_cuda):
        # All that can fail comes before the first tensor is written.
        options = [self._options(group) for group in self.param_groups] if not on_cuda else []
        if not on_cuda and self._overflowed():
            return
        lists = [self._init_lists(group) for group in self.param_groups]
        if not on_cuda:
            self._unscale()
        if self._plan is not None and self._step_again(on_cuda):
            return
        if on_cuda:
            self._torch_step()
        elif not all(map(self._agree, options, lists)):
            self._let_torch_judge(is_fused=False)  # its fused kernels look at neither shapes nor layouts
        elif any(group.get("capturable") for group in self.param_groups):
            self._let_torch_judge(is_fused=True)
        elif not all(_is_for_reference(tensor) for params, grads, *_ in lists for tensor in (*params, *grads)):
            self._torch_step()
        else:
            for group, tensors in zip(options, lists, strict=True):
                self._reference_step(group, *tensors)

    def _step_again(self, on_cuda):
        if on_cuda:
            return self._step_scaled(self._plan)
        return self._plan.step(self.param_groups, self.state)

    def _devices(self):
        """Types of the devices that hold what is to be updated; None if only torch's own step takes it."""
        if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            return None  # a dispatch mode or a functorch transform must see each call
        devices = set()
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                for tensor in (param, grad):
                    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or group.get("differentiable"):
                        return None
                    if tensor.is_cuda and (tensor.layout != torch.strided or tensor.dtype not in KERNEL_DTYPES):
                        return None
                    devices.add(tensor.device.type)
        return devices if devices <= {"cpu", "cuda"} else None

    def _options(self, group):
        """The hyper-parameters of a group as plain numbers and flags.

        Raises:
            TypeError: one is not a number.
        """
        return {name: _option(name, group[name]) for name in self._option_names}

    def _overflowed(self):
        """Whether a ``GradScaler`` wants the step skipped, of an optimizer made with ``fused=True``."""
        found_inf = getattr(self, "found_inf", None)
        # A scaler sums found_inf over devices, so it may exceed 1.
        return found_inf is not None and found_inf.item() > 0

    def _unscale(self):
        """Divide the gradients by the scale that a ``GradScaler`` leaves to an optimizer made with ``fused=True``."""
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            grads = {p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
            for grad in grads:
                grad.div_(grad_scale)

    def _let_torch_judge(self, is_fused):
        """torch's own step, of gradients that are unscaled; in its loop over tensors where ``fused`` may not stay."""
        fused = [(group, group["fused"]) for group in self.param_groups if group.get("fused") and not is_fused]
        scaling = {name: self.__dict__.pop(name) for name in ("grad_scale", "found_inf") if name in self.__dict__}
        for group, _ in fused:
            group["fused"] = False
        try:
            with values_as_they_were(_dense_tensors(self)):  # it may fail when it has updated some
                self._torch_step()
        finally:
            self.__dict__.update(scaling)
            for group, value in fused:
                group["fused"] = value

    def _agree(self, options, lists):
        """Whether nothing in a group's lists is for torch to judge: each tensor is like its parameter, steps count."""
        params, grads, *states = lists
        steps = states.pop() if self._counts_steps else []
        return all(map(_is_count, steps)) and all(
            _is_like(tensor, param) or self._may_be(tensor, grad, options)
            for tensors in (params, grads, *states)
            for param, grad, tensor in zip(params, grads, tensors, strict=False)
        )

    def _may_be(self, tensor, grad, options):
        """Whether a tensor that is not like its parameter is still an ordinary one for torch's own step."""
        return False

    def _torch_step(self, closure=None):
        """torch's own step, without the hooks that its class may have been wrapped with."""
        step = self._torch_class.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        return step(self, closure)

    @property
    def _torch_class(self):
        return next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch.optim"))

    @abc.abstractmethod
    def _init_lists(self, group):
        """A group's tensors in the order its reference takes them; makes missing state as torch does."""

    @abc.abstractmethod
    def _reference_step(self, options, *tensors):
        """Update lists of tensors by plain torch."""


def _dense_tensors(optimizer):
    """Parameters that have a gradient, and their states; not those with a sparse gradient, whose size may be huge."""
    tensors = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout == torch.strided:
                state = optimizer.state.get(param, {})
                tensors += [param, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    return tensors


def _is_like(tensor, param):
    """Whether a parameter's own tensor, gradient or state can be computed with, element by element."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == param.shape
        and tensor.dtype == param.dtype
        and (tensor.dtype in KERNEL_DTYPES or (tensor.is_complex() and not tensor.is_conj()))
        and tensor.device == param.device
        and tensor.layout == torch.strided
        and torch._debug_has_internal_overlap(tensor) != 1
    )


def _is_count(step):
    return (
        isinstance(step, torch.Tensor)
        and step.is_cpu
        and step.layout == torch.strided
        and step.numel() == 1
        and step.is_floating_point()
        and step.item() >= 0
    )


def _is_for_reference(tensor):
    return tensor.dtype in KERNEL_DTYPES and tensor.layout == torch.strided


def _option(name, value):
    if name in _FLAGS:
        return bool(value)
    if name == "betas":
        beta1, beta2 = value
        return _number(name, beta1), _number(name, beta2)
    return _number(name, value)


def _number(name, value):
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{name} must be a number, got {value!r}")
