"""Cases of the benchmark and rows of the sweep: their names, and the bytes that each must move."""

from dataclasses import dataclass, field
from math import prod

import torch

from . import tables

DTYPES = {torch.float32: "", torch.float64: " f64", torch.bfloat16: " bf16", torch.float16: " f16"}  # in names
LAYOUTS = {  # with the numbers of dimensions that have them
    "": (lambda values: values, (2, 3, 4)),
    "channels_last": (lambda values: values.movedim(1, -1).contiguous().movedim(-1, 1), (3, 4)),
    "transposed": (lambda values: values.transpose(0, 1).contiguous().transpose(0, 1), (2,)),
    "rows apart": (lambda values: values.repeat_interleave(2, 0)[::2], (2,)),
}
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
    label: str
    model: str
    shapes: tuple = field(repr=False)
    dtype: torch.dtype = torch.float32
    devices: tuple = tables.BOTH
    kind = "optimizer"

    @property
    def name(self):
        return f"{self.label}: {self.model}{DTYPES[self.dtype]}"

    @property
    def array_bytes(self):
        """Of the parameters, the gradients, or a state."""
        return sum(map(prod, self.shapes)) * self.dtype.itemsize

    @property
    def terms(self):
        states, itemsize = " ".join(["", *self.optimizer.states]), self.dtype.itemsize
        n_arrays = 3 + 2 * len(self.optimizer.states)
        product = f"{n_arrays} x {itemsize} B x {self.array_bytes // itemsize:,}"
        return [(f"param grad{states} -> param{states}: {product}", n_arrays * self.array_bytes)]


@dataclass(frozen=True)
class LossCase(Case):
    """Forward and backward into a fresh gradient, or the loss alone."""

    loss: tables.Loss
    shape: tuple
    dtype: torch.dtype = torch.float32
    trait: str = ""  # a layout, or another that the name shows
    options: dict = field(default_factory=dict)
    devices: tuple = tables.BOTH
    kind = "loss"

    @property
    def name(self):
        size = f"{self.loss.name.replace('_', '-')} {' x '.join(map(str, self.shape))}{DTYPES[self.dtype]}"
        return ", ".join([size, *filter(None, [self.trait]), *_shown(self.options)])

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


def _shown(options):
    """Options as they stand in a name."""
    short = {"label_smoothing": "smoothing"}
    return [short.get(key, key if value is True else f"{key}={value}") for key, value in options.items()]


def _loss_case(loss, shape, dtype, variant, *devices):
    trait, options = (variant, {}) if isinstance(variant, str) else ("", variant)
    return LossCase(loss, shape, dtype, trait, options, *devices)


def benchmark_cases(device, only="", quick=False):
    """The cases of ``device`` ("cpu" or "cuda") whose name has ``only``; none that takes seconds if ``quick``."""
    cases = [
        OptimizerCase(optimizer, optimizer.label, model, shapes, dtype, devices)
        for model, shapes, has_bf16 in tables.MODELS
        for dtype, devices in ((torch.float32, tables.BOTH), (torch.bfloat16, tables.CUDA))[: 1 + has_bf16]
        for optimizer in tables.OPTIMIZERS
        if optimizer.label
    ]
    for loss in tables.LOSSES:
        for devices, dtype, variant, *shapes in loss.timed:
            cases += [_loss_case(loss, shape, dtype, variant, devices) for shape in shapes]
    named = [case for case in cases if device in case.devices and only.lower() in case.name.lower()]
    return [case for case in named if not quick or device == "cuda" or case.bytes_moved <= LONG_BYTES]


def sweep_rows(rng=None, dtypes=tuple(DTYPES)):
    """All rows of the sweep; with a ``random.Random`` of shapes that it draws."""
    all_shapes = tables.SWEEP_SHAPES if rng is None else _drawn_shapes(rng)
    models = tables.SWEEP_MODELS if rng is None else list(_drawn_models(rng))
    for optimizer in tables.OPTIMIZERS:
        label = " ".join([optimizer.name, *_shown(optimizer.options)])
        for model, shapes in models if optimizer.torch_class else ():
            yield from (OptimizerCase(optimizer, label, model, shapes, dtype) for dtype in dtypes)
    for loss in tables.LOSSES:
        for variant in loss.variants:
            _, n_dims = LAYOUTS.get(str(variant), LAYOUTS[""])
            for shape in all_shapes:
                if len(shape) in n_dims:
                    yield from (_loss_case(loss, shape, dtype, variant) for dtype in dtypes)


def _drawn_models(rng):
    for _ in range(5):
        n_tensors, n_params = _log_uniform(rng, 1, 400), _log_uniform(rng, 200, 4e6)
        mean = n_params / n_tensors
        shapes = tuple((max(1, round(mean * rng.uniform(0.3, 1.7))),) for _ in range(n_tensors))
        yield f"{n_tensors} tensors, {sum(map(prod, shapes)):,}", shapes


def _drawn_shapes(rng):
    shapes = []
    while len(shapes) < 14:
        after = rng.choice([(), (), (), (300,), (128, 128)])
        shape = (_log_uniform(rng, 1, 4000), _log_uniform(rng, 2, 60000), *(_log_uniform(rng, 1, n) for n in after))
        if 20 <= prod(shape) <= 6e6:
            shapes.append(shape)
    return shapes


def _log_uniform(rng, low, high):
    return round(low * (high / low) ** rng.random())
