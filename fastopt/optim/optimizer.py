"""The base of the fused optimizers: one native call a step, and the paths of a step that no kernel takes."""

import copyreg
import functools
import math
import numbers

import numpy as np
import torch
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer

from .. import _calls
from .._build import native
from .._ops import KERNEL_DTYPES
from .atomic import dense_tensors, lock_of, restoring_state, restoring_values
from .hooks import run_closure, with_hooks_if_any, wrap_step_of
from .ordinary import (
    check_backed,
    has_ordinary_containers,
    has_torchs_init_group,
    is_free_of_modes,
    is_like,
    is_ordinary_class,
    is_ordinary_tensor,
    is_scalar_state,
)
from .shards import shards_of
from .unsupported import step_in_two


class FusedOptimizer(Optimizer):
    """Mixed in before a torch optimizer, it replaces ``step``, and ``zero_grad`` while no profiler is active.

    A step takes the first of these paths that is open to it; all have the same meaning:

    1. the kernels: dense tensors of float64, float32, bfloat16 or float16 on the CPU or a CUDA device;
    2. the reference, in plain torch: such tensors on the CPU where there is no library, and layouts no kernel walks;
    3. torch's own ``step``: sparse and complex gradients, other devices, ``differentiable``, tensor subclasses, CUDA
       without kernels for it, an ``_init_group`` or containers that a subclass has made its own, while
       ``torch.compile`` traces, under modes and functorch transforms, and in forward-mode differentiation.

    On the CPU, parameters that no kernel takes leave the first path open to the others, see
    :mod:`fastopt.optim.unsupported`.
    DTensor parameters take these paths with their local shards, see :mod:`fastopt.optim.shards`.
    A step that fails changes nothing, on the first two paths and on torch's for dense tensors on the CPU. In the
    kernels, Ctrl-C waits for its end.
    A class names its operator, ``class Adam(FusedOptimizer, torch.optim.Adam, operator=adam_)``, whose schema holds the
    rest. The functions of torch's class are those of that moment.
    """

    _operator = None
    _torch_step_function = None
    _torch_init_group = None
    _plan = None

    def __init_subclass__(cls, operator=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if operator is not None:
            torch_class = cls.__bases__[1]
            cls._operator = operator
            cls._torch_step_function = without_hooks(torch_class.step)
            cls._torch_init_group = torch_class._init_group

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
                loss = run_closure(self, closure)
        self._update()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        # torch marks a range for profiles always, which takes longer than the rest; here only while there is one.
        if not set_to_none or is_compiling() or torch.autograd._profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def _patch_step_function(self):
        wrap_step_of(type(self))
        super()._patch_step_function()  # finds the step wrapped

    def _update(self):
        if not self._update_natively():
            with lock_of(self):
                self._update_otherwise()

    def _update_natively(self):
        plan = self._plan
        if plan is None:
            library = native.module()
            if library is None:
                return False
            copyreg.pickle(library.StepPlan, _no_plan)
            init_group = type(self)._torch_init_group
            plan = library.StepPlan(self._operator.name, functools.partial(is_ordinary_class, init_group=init_group))
            vars(self)["_plan"] = plan  # a subclass may have a __setattr__
        return plan.step(self)

    @torch.no_grad()
    def _update_otherwise(self):
        """Everything that the kernels refuse."""
        if not (is_free_of_modes() and has_torchs_init_group(self, type(self)._torch_init_group)):
            self._torch_step()
            return
        shards = shards_of(self)
        if shards is not None:
            shards.step()
            return
        if self._plan is not None and step_in_two(self, self._plan, reads_scaling=True):
            return
        self._update_without_kernels()

    def _update_without_kernels(self):
        devices = self._devices()
        if devices is None or ("cuda" in devices and not native.cuda()):
            self._torch_step()
        else:
            with restoring_state(self):
                self._update_ordinary_tensors("cuda" in devices)

    def _update_ordinary_tensors(self, on_cuda):
        # All that can fail comes before the first tensor is written.
        options = [self._options(group) for group in self.param_groups] if not on_cuda else []
        if not on_cuda and self._overflowed():
            return
        lists = [self._init_lists(group) for group in self.param_groups]
        if not on_cuda:
            self._unscale()
        if self._plan is not None and self._plan.step(self, reads_scaling=on_cuda):
            return
        if self._plan is not None and not on_cuda and step_in_two(self, self._plan, reads_scaling=False):
            return
        if on_cuda or not has_ordinary_containers(self):
            self._torch_step()
        elif not all(map(self._all_tensors_match, options, lists)):
            self._torch_step_or_rollback(is_fused=False)  # its fused kernels look at neither shapes nor layouts
        elif any(group.get("capturable") for group in self.param_groups):
            self._torch_step_or_rollback(is_fused=True)
        elif not all(_is_for_reference(tensor) for params, grads, *_ in lists for tensor in (*params, *grads)):
            self._torch_step()
        else:
            for group, tensors in zip(options, lists, strict=True):
                self._reference_step(group, *tensors)
            _calls.note("step", "reference")

    def _devices(self):
        """Types of the devices that hold what is to be updated; None if only torch's own step takes it."""
        devices = set()
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                for tensor in (param, grad):
                    if not is_ordinary_tensor(tensor) or group.get("differentiable"):
                        return None
                    if tensor.is_cuda and (tensor.layout != torch.strided or tensor.dtype not in KERNEL_DTYPES):
                        return None
                    check_backed(tensor)
                    devices.add(tensor.device.type)
        return devices if devices <= {"cpu", "cuda"} else None

    def _options(self, group):
        """The hyper-parameters of a group as plain numbers and flags.

        Raises:
            TypeError: one is not a number.
        """
        return {
            option.name: bool(value) if option.is_flag else _number(option.group_key, value)
            for option in self._operator.options
            for value in [option.value_in(group)]
        }

    def _overflowed(self):
        """True if a ``GradScaler`` wants the step skipped, of an optimizer made with ``fused=True``."""
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

    def _torch_step_or_rollback(self, is_fused):
        """torch's own step, of gradients that are unscaled; in its loop over tensors where ``fused`` may not stay."""
        fused = [(group, group["fused"]) for group in self.param_groups if group.get("fused") and not is_fused]
        scaling = {name: self.__dict__.pop(name) for name in ("grad_scale", "found_inf") if name in self.__dict__}
        for group, _ in fused:
            group["fused"] = False
        try:
            with restoring_values(dense_tensors(self)):  # it may fail when it has updated some
                self._torch_step()
        finally:
            self.__dict__.update(scaling)
            for group, value in fused:
                group["fused"] = value

    def _all_tensors_match(self, options, lists):
        """True if a group is for the reference: tensors match their parameters, steps are counts, numbers fit."""
        params, grads, *kept = lists
        scalars, states = [], []
        for tensors, is_scalar in zip(kept, self._operator.keeps_scalar, strict=True):
            (scalars if is_scalar else states).append(tensors)
        return (
            all(is_scalar_state(tensor) for tensors in scalars for tensor in tensors)
            and all(0 <= options[option.name] < 1 for option in self._operator.options if option.is_decay_rate)
            and (_fits_float32(options) or all(param.dtype == torch.float64 for param in params))
            and all(
                is_like(tensor, param) or self._may_be(tensor, grad, options)
                for tensors in (params, grads, *states)
                for param, grad, tensor in zip(params, grads, tensors, strict=False)
            )
        )

    def _may_be(self, tensor, grad, options):
        """True if a tensor that does not match its parameter is still an ordinary one for torch's own step."""
        return tensor is grad and grad.is_sparse

    def _torch_step(self, closure=None):
        """torch's own step, without the hooks that its class may have been wrapped with."""
        loss = self._torch_step_function(closure)
        _calls.note("step", "torch")
        return loss

    def _init_lists(self, group):
        """A group's tensors in the order of the operator's lists; makes missing state as torch does."""
        lists = [[] for _ in range(self._operator.n_lists)]
        self._init_group(group, *lists)
        return lists

    def _reference_step(self, options, *lists):
        """Update lists of tensors in plain torch."""
        self._operator.reference(*lists, **options)


# Not by decorators, behind which type checkers see no methods.
FusedOptimizer.step = with_hooks_if_any(FusedOptimizer.step)
FusedOptimizer.zero_grad.__doc__ = Optimizer.zero_grad.__doc__
FusedOptimizer.zero_grad.__qualname__ = Optimizer.zero_grad.__qualname__  # its name in a TypeError


def without_hooks(step):
    """The function that torch has wrapped with hooks, if it has."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


def _no_plan(plan):
    """How a plan is copied and pickled: as None, for another is made with the next step."""
    return type(None), ()


def _is_for_reference(tensor):
    return tensor.dtype in KERNEL_DTYPES and tensor.layout == torch.strided


def _fits_float32(options):
    """True if float32 can hold every finite number and its product with a bias correction."""
    return all(abs(number) < 1e30 or not math.isfinite(number) for number in options.values())


def _number(name, value):
    if isinstance(value, (float, int)):  # of a subclass, the number that it holds, as torch takes it
        return float.__float__(value) if isinstance(value, float) else int.__float__(value)
    if (isinstance(value, torch.Tensor) and value.numel() == 1) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{name} must be a number, got {value!r}")
