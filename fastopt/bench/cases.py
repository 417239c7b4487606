"""The tables of what is timed, and the bytes that each case must move."""

import inspect
from dataclasses import dataclass, field
from math import prod

import torch

from .. import functional

INDEX_BYTES = 8  # of an int64 target


@dataclass(frozen=True)
class OptimizerCase:
    """One step over the tensors of a model whose gradients are there."""

    label: str
    optimizer: str
    options: dict
    moves: str  # arrays read -> arrays written, each of the parameters' size and dtype
    model: str
    shapes: tuple = field(repr=False)
    dtype: torch.dtype = torch.float32
    devices: tuple = ("cpu", "cuda")
    kind = "optimizer"

    @property
    def name(self):
        return f"{self.label}: {self.model}{suffix(self.dtype)}"

    @property
    def n_params(self):
        return sum(map(prod, self.shapes))

    @property
    def n_arrays(self):
        """Arrays that a step holds: parameters, gradients and states."""
        return len(set(self.moves.replace("->", "").split()))

    @property
    def n_arrays_moved(self):
        return len(self.moves.replace("->", "").split())

    @property
    def bytes_moved(self):
        return self.n_arrays_moved * self.dtype.itemsize * self.n_params

    @property
    def working(self):
        """The sum behind ``bytes_moved``."""
        product = f"{self.n_arrays_moved} x {self.dtype.itemsize} B x {self.n_params:,}"
        return f"{self.moves}: {product} = {self.bytes_moved:,} B"

    @property
    def is_long(self):
        return self.bytes_moved > 1e9


@dataclass(frozen=True)
class LossCase:
    """Forward and backward into a fresh gradient, or the loss alone."""

    shape: tuple
    dtype: torch.dtype = torch.float32
    label_smoothing: float = 0.0
    has_probabilities: bool = False
    is_channels_last: bool = False
    is_in_place: bool = False  # the gradient may take the logits' memory
    needs_grad: bool = True
    devices: tuple = ("cpu", "cuda")
    kind = "loss"

    @property
    def name(self):
        traits = {
            "channels_last": self.is_channels_last,
            "smoothing": self.label_smoothing,
            "probabilities": self.has_probabilities,
            "in place": self.is_in_place,
            "no gradient": not self.needs_grad,
        }
        suffixes = "".join(f", {trait}" for trait, holds in traits.items() if holds)
        return f"cross-entropy {' x '.join(map(str, self.shape))}{suffix(self.dtype)}{suffixes}"

    @property
    def n_logits(self):
        return prod(self.shape)

    @property
    def n_positions(self):
        return self.n_logits // self.shape[1]

    @property
    def _parts(self):
        parts = [("read logits", self.dtype.itemsize, self.n_logits)]
        if self.has_probabilities:
            parts.append(("read probabilities", self.dtype.itemsize, self.n_logits))
        else:
            parts.append(("read targets", INDEX_BYTES, self.n_positions))
        if self.needs_grad:
            parts.append(("write gradient", self.dtype.itemsize, self.n_logits))
        return parts

    @property
    def bytes_moved(self):
        return sum(itemsize * count for _, itemsize, count in self._parts)

    @property
    def working(self):
        """The sum behind ``bytes_moved``."""
        terms = " + ".join(f"{what} {itemsize} B x {count:,}" for what, itemsize, count in self._parts)
        return f"{terms} = {self.bytes_moved:,} B"

    @property
    def is_long(self):
        return self.n_logits > 20e6


def suffix(dtype):
    """The dtype at the end of a case's name."""
    return {torch.float32: "", torch.float64: " f64", torch.bfloat16: " bf16", torch.float16: " f16"}[dtype]


LENET = ((6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 256), (120,), (84, 120), (84,), (10, 84), (10,))
CNN = ((32, 1, 3, 3), (32,), (64, 32, 3, 3), (64,), (128, 9216), (128,), (10, 128), (10,))
MANY = ((64,),) * 1000
_ATTENTION = ((768,), (768,), (2304, 768), (2304,), (768, 768), (768,))
_FEED_FORWARD = ((768,), (768,), (3072, 768), (3072,), (768, 3072), (768,))
GPT2 = ((50257, 768), (1024, 768), *(12 * (_ATTENTION + _FEED_FORWARD)), (768,), (768,))

# Model, tensors, whether its 16-bit variant is timed on CUDA too.
MODELS = (
    ("LeNet, 44 k in 10 tensors", LENET, False),
    ("MNIST CNN, 1.2 M in 8", CNN, False),
    ("1000 tensors of 64", MANY, True),
    ("GPT-2 small, 124 M in 148", GPT2, True),
)

# Gradients stay the same from step to step. The long memory keeps the centered variance from rounding to zero.
_CENTERED = dict(lr=1e-2, alpha=0.99999, momentum=0.9, centered=True)
OPTIMIZERS = (
    ("SGD", "SGD", dict(lr=1e-2), "param grad -> param"),
    ("momentum", "SGD", dict(lr=1e-2, momentum=0.9), "param grad momentum_buffer -> param momentum_buffer"),
    ("RMSprop", "RMSprop", dict(lr=1e-2), "param grad square_avg -> param square_avg"),
    (
        "RMSprop centered, momentum",
        "RMSprop",
        _CENTERED,
        "param grad square_avg grad_avg momentum_buffer -> param square_avg grad_avg momentum_buffer",
    ),
    ("Adam", "Adam", dict(lr=1e-2), "param grad exp_avg exp_avg_sq -> param exp_avg exp_avg_sq"),
    (
        "AdamW",
        "AdamW",
        dict(lr=1e-2, weight_decay=1e-2),
        "param grad exp_avg exp_avg_sq -> param exp_avg exp_avg_sq",
    ),
)

OPTIMIZER_CASES = tuple(
    OptimizerCase(*optimizer, model, shapes, dtype, ("cpu", "cuda") if dtype == torch.float32 else ("cuda",))
    for model, shapes, has_bf16 in MODELS
    for dtype in (torch.float32, torch.bfloat16)[: 1 + has_bf16]
    for optimizer in OPTIMIZERS
)

_CPU, _CUDA = {"devices": ("cpu",)}, {"devices": ("cuda",)}
BF16 = torch.bfloat16

LOSS_CASES = (
    LossCase((64, 10)),
    LossCase((1024, 10), **_CPU),
    LossCase((128, 1000), **_CPU),
    LossCase((4096, 1000), **_CPU),
    LossCase((4096, 1000), BF16, **_CPU),
    LossCase((512, 32000), **_CPU),
    LossCase((512, 32000), label_smoothing=0.1, **_CPU),
    LossCase((512, 32000), BF16, **_CPU),
    LossCase((512, 32000), has_probabilities=True, **_CPU),
    LossCase((512, 32000), is_in_place=True, **_CPU),
    LossCase((512, 32000), needs_grad=False, **_CPU),
    LossCase((256, 128256), **_CPU),
    LossCase((65536, 1000), **_CUDA),
    LossCase((65536, 1000), BF16, **_CUDA),
    LossCase((8192, 32000), BF16, **_CUDA),
    LossCase((8192, 32000), BF16, label_smoothing=0.1, **_CUDA),
    LossCase((8192, 32000), BF16, is_in_place=True, **_CUDA),
    LossCase((8192, 32000), BF16, needs_grad=False, **_CUDA),
    LossCase((8192, 50257), BF16, **_CUDA),  # rows that start at odd addresses
    LossCase((8192, 128256), BF16, **_CUDA),
    LossCase((16, 128256), BF16, **_CUDA),  # fewer rows than multiprocessors
    LossCase((8, 21, 256, 256)),
    LossCase((8, 21, 256, 256), is_channels_last=True),
)


def cases_for(device, only="", quick=False):
    """The cases of ``device`` ("cpu" or "cuda") whose name has ``only``; none that takes seconds if ``quick``."""
    has_in_place = "inplace_backward" in inspect.signature(functional.cross_entropy).parameters
    return [
        case
        for case in (*OPTIMIZER_CASES, *LOSS_CASES)
        if device in case.devices
        and only.lower() in case.name.lower()
        and not (quick and device == "cpu" and case.is_long)
        and (has_in_place or not getattr(case, "is_in_place", False))
    ]
