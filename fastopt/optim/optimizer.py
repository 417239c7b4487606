"""What the fused optimizers share: one native call a step, and where a step goes that no kernel takes."""

import abc
import functools

import torch
from torch.compiler import is_compiling
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from .. import _native
from ..reference import KERNEL_DTYPES


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
    """Mixed in before a torch optimizer, it replaces ``step`` and nothing else.

    A step takes the first of these roads that is open to it; all have the same meaning:

    1. the kernels: dense tensors of float64, float32, bfloat16 or float16 on the CPU or a CUDA device;
    2. ``reference.py``, in plain torch: such tensors on the CPU where there is no library, and layouts no kernel walks;
    3. torch's own ``step``: sparse and complex gradients, other devices, ``differentiable``, tensor subclasses, CUDA
       without kernels for it, while ``torch.compile`` traces, and under dispatch modes and functorch transforms.

    A subclass names its plan (a class of the extension module) and its hyper-parameters, and calls its reference.
    """

    _plan_name = None
    _option_names = ()
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
        if not self._update_natively():
            self._update_otherwise()
        return loss

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
        devices = self._devices()
        if devices is None or ("cuda" in devices and not _native.cuda()):
            self._torch_step()
            return
        # All that can fail comes before the first tensor is written.
        options = [self._options(group) for group in self.param_groups] if "cuda" not in devices else []
        if devices == {"cpu"} and not self._unscale():
            return
        lists = [self._init_lists(group) for group in self.param_groups]
        if self._plan is not None and self._step_again(devices):
            return
        if "cuda" in devices or not all(map(_agree, lists)):
            self._torch_step()
            return
        for group, tensors in zip(options, lists, strict=True):
            self._reference_step(group, *tensors)

    def _step_again(self, devices):
        if "cuda" in devices:
            return self._step_scaled(self._plan)
        return self._plan.step(self.param_groups, self.state)

    def _devices(self):
        """Types of the devices that hold what is to be updated; None if only torch's own step takes it."""
        if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            return None  # a dispatch mode or a functorch transform must see each call
        devices = set()
        for group in self.param_groups:
            if group.get("differentiable"):
                return None
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                for tensor in (param, grad):
                    if (
                        tensor.layout != torch.strided
                        or tensor.dtype not in KERNEL_DTYPES
                        or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
                    ):
                        return None
                    devices.add(tensor.device.type)
                if group.get("capturable") and param.device.type == "cpu":
                    return None
        return devices if devices <= {"cpu", "cuda"} else None

    def _options(self, group):
        """The hyper-parameters of a group as plain numbers.

        Raises:
            TypeError: one is not a number.
        """
        return {name: _number(name, group[name]) for name in self._option_names}

    def _unscale(self):
        """What a ``GradScaler`` leaves to the step of an optimizer made with ``fused=True``; False to skip the step."""
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        # A scaler sums found_inf over devices, so it may exceed 1.
        if found_inf is not None and found_inf.item() > 0:
            return False
        if grad_scale is not None:
            grads = {p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
            for grad in grads:
                grad.div_(grad_scale)
        return True

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


def _agree(lists):
    """Whether each parameter's gradient and states have its shape and dtype; mixtures are for torch to judge."""
    params, *others = lists
    return all(
        tensor is None or tensor.dim() == 0 or (tensor.shape == param.shape and tensor.dtype == param.dtype)
        for other in others
        for param, tensor in zip(params, other, strict=False)
    )


def _number(name, value):
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(_number(name, part) for part in value)
    if isinstance(value, (int, float)):
        return value
    raise TypeError(f"{name} must be a number, got {value!r}")
