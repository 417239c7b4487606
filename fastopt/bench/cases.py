"""Cases of the benchmark: their names, and the bytes that each must move."""

from dataclasses import dataclass, field
from math import prod

import torch

from . import tables

DTYPES = {torch.float32: "", torch.float64: " f64", torch.bfloat16: " bf16", torch.float16: " f16"}  # in names
LONG_BYTES = 2e8  # cases that move more take seconds on a CPU


class Case:
    """``terms``: of the work, each as a text and the bytes that it moves."""

    @property
    def bytes_moved(self):
        return sum(n_bytes for _, n_bytes in self.terms)

    @property
    def working(self):
        """The sum behind ``bytes_moved``."""
        return f"{' + '.join(text for text, _ in self.terms)} = {self.bytes_moved:,} B"


@dataclass(frozen=True)
class OptimizerCase(Case):
    """One step over the tensors of a model whose gradients are there."""

    optimizer: tables.Optimizer
    name: str
    shapes: tuple = field(repr=False)
    dtype: torch.dtype = torch.float32
    kind = "optimizer"

    @property
    def terms(self):
        states, itemsize, n_params = self.optimizer.states, self.dtype.itemsize, sum(map(prod, self.shapes))
        arrays, n_arrays = " ".join(["", *states]), 3 + 2 * len(states)
        product = f"{n_arrays} x {itemsize} B x {n_params:,}"
        return [(f"param grad{arrays} -> param{arrays}: {product}", n_arrays * itemsize * n_params)]


@dataclass(frozen=True)
class LossCase(Case):
    """Forward and backward into a fresh gradient, or the loss alone."""

    loss: tables.Loss
    shape: tuple
    dtype: torch.dtype = torch.float32
    trait: str = ""  # a layout, or another that the name shows
    options: dict = field(default_factory=dict)
    kind = "loss"

    @property
    def name(self):
        size = f"{self.loss.name.replace('_', '-')} {' x '.join(map(str, self.shape))}{DTYPES[self.dtype]}"
        return ", ".join([size, *filter(None, [self.trait]), *shown(self.options)])

    @property
    def target(self):
        return self.trait if self.trait == "probabilities" else self.loss.target

    @property
    def needs_grad(self):
        return self.trait != "no gradient"

    @property
    def terms(self):
        n_logits, itemsize = prod(self.shape), self.dtype.itemsize
        inputs = "input" if self.target == "values" else "logits"
        indices = "read targets", torch.int64.itemsize, n_logits // self.shape[1]
        parts = [
            (f"read {inputs}", itemsize, n_logits // (2 if self.trait == "half ignored" else 1)),
            indices if self.target == "indices" else (f"read {self.target}", itemsize, n_logits),
            *[("write gradient", itemsize, n_logits)] * self.needs_grad,
        ]
        return [(f"{part} {size} B x {count:,}", size * count) for part, size, count in parts]


def shown(options):
    """Options as they stand in a name."""
    short = {"label_smoothing": "smoothing"}
    return [short.get(key, key if value is True else f"{key}={value}") for key, value in options.items()]


def loss_case(loss, shape, dtype, variant):
    """The case of a variant of the tables: a trait or options."""
    return LossCase(loss, shape, dtype, **({"trait": variant} if isinstance(variant, str) else {"options": variant}))


def benchmark_cases(device, only="", quick=False):
    """The cases of ``device`` ("cpu" or "cuda") whose name has ``only``; none that takes seconds if ``quick``."""
    cases = []
    for model, shapes, has_bf16 in tables.MODELS:
        for dtype in (torch.float32, torch.bfloat16)[: 1 + (has_bf16 and device == "cuda")]:
            name = f"{model}{DTYPES[dtype]}"
            labelled = [row for row in tables.OPTIMIZERS if row.label]
            cases += [OptimizerCase(row, f"{row.label}: {name}", shapes, dtype) for row in labelled]
    for loss in tables.LOSSES:
        for devices, dtype, variant, *shapes in loss.timed:
            cases += [loss_case(loss, shape, dtype, variant) for shape in shapes if device in devices]
    named = [case for case in cases if only.lower() in case.name.lower()]
    return [case for case in named if not quick or device == "cuda" or case.bytes_moved <= LONG_BYTES]
