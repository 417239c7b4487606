"""Losses as modules."""

from typing import Any

import torch

from . import functional
from .vocab_parallel import SavedGroup

__all__ = ["CrossEntropyLoss", "L1Loss", "MSELoss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`fastopt.functional.cross_entropy` as a module; arguments, buffers and errors of torch's namesake.

    Args:
        weight: weight of each class, shape (C,), or None for all ones. Default: None
        ignore_index: class index of targets that count for nothing. Default: -100
        reduction: "none", "mean" or "sum". Default: "mean"
        label_smoothing: share of each target that is spread over all classes, in [0, 1]. Default: 0.0
        size_average, reduce: deprecated, as in torch.
        inplace_backward: see :func:`fastopt.functional.cross_entropy`. Default: False
        process_group: processes that share the classes, see :func:`fastopt.functional.cross_entropy`. Default: None

    Shape:
        input: (C,), (N, C) or (N, C, d1, ...); target: its shape without C (class indices), or its shape
        (class probabilities); result: a scalar, or the shape of the indices if reduction is "none".
    """

    # Class attributes, for modules that were pickled before these existed.
    inplace_backward: bool = False
    process_group = None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
        process_group: Any | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward
        self.process_group = process_group

    def __getstate__(self):
        state = self.__dict__.copy()  # a process group cannot be pickled or copied, its name can
        if self.process_group is not None and not isinstance(self.process_group, SavedGroup):
            state["process_group"] = SavedGroup(self.process_group.group_name)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if isinstance(self.process_group, SavedGroup):
            self.process_group = self.process_group.resolved()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )


class MSELoss(torch.nn.MSELoss):
    """:func:`fastopt.functional.mse_loss` as a module; arguments and errors of torch's namesake.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" or "sum". Default: "mean"
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    """:func:`fastopt.functional.l1_loss` as a module; arguments and errors of torch's namesake.

    Args:
        size_average, reduce: deprecated, as in torch.
        reduction: "none", "mean" or "sum". Default: "mean"
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.l1_loss(input, target, reduction=self.reduction)
