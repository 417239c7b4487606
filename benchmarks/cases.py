"""The table of benchmark cases, with the bytes each must move."""

from dataclasses import dataclass, field
from math import prod

import torch


@dataclass(frozen=True)
class OptimizerCase:
    name: str
    optimizer: str
    options: dict
    shapes: list = field(repr=False)
    arrays_moved: int  # read or written, each of the parameters' size

    @property
    def bytes_moved(self):
        return 4 * self.arrays_moved * sum(map(prod, self.shapes))

    @property
    def is_long(self):
        return self.bytes_moved > 1e9


@dataclass(frozen=True)
class LossCase:
    name: str
    shape: tuple
    dtype: torch.dtype = torch.float32
    label_smoothing: float = 0.0
    has_probabilities: bool = False
    is_channels_last: bool = False

    @property
    def bytes_moved(self):
        # Reads logits, and probabilities if given; writes the gradient.
        return prod(self.shape) * self.dtype.itemsize * (3 if self.has_probabilities else 2)

    @property
    def is_long(self):
        return prod(self.shape) > 20e6


LENET = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 256), (120,), (84, 120), (84,), (10, 84), (10,)]
CNN = [(32, 1, 3, 3), (32,), (64, 32, 3, 3), (64,), (128, 9216), (128,), (10, 128), (10,)]
MANY = [(64,)] * 1000
_BLOCK = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,), (768, 3072)]
GPT2 = [(50257, 768), (1024, 768), *[shape for _ in range(12) for shape in [*_BLOCK, (768,)]], (768,), (768,)]

_MODELS = [
    ("LeNet, 44 k in 10 tensors", LENET),
    ("MNIST CNN, 1.2 M in 8", CNN),
    ("1000 tensors of 64", MANY),
    ("GPT-2 small, 124 M in 148", GPT2),
]
_OPTIMIZERS = [
    ("SGD", "SGD", dict(lr=1e-4), 3),  # reads p g, writes p
    ("momentum", "SGD", dict(lr=1e-4, momentum=0.9), 5),  # and reads and writes its buffer
    ("RMSprop", "RMSprop", dict(lr=1e-5), 5),
    ("Adam", "Adam", dict(lr=1e-5), 7),
]

OPTIMIZER_CASES = [
    OptimizerCase(f"{label}: {model}", name, options, shapes, arrays)
    for model, shapes in _MODELS
    for label, name, options, arrays in _OPTIMIZERS
]

LOSS_CASES = [
    LossCase("cross-entropy 64 x 10", (64, 10)),
    LossCase("cross-entropy 1024 x 10", (1024, 10)),
    LossCase("cross-entropy 128 x 1000", (128, 1000)),
    LossCase("cross-entropy 4096 x 1000", (4096, 1000)),
    LossCase("cross-entropy 4096 x 1000 bf16", (4096, 1000), torch.bfloat16),
    LossCase("cross-entropy 512 x 32000", (512, 32000)),
    LossCase("cross-entropy 512 x 32000, smoothing", (512, 32000), label_smoothing=0.1),
    LossCase("cross-entropy 512 x 32000 bf16", (512, 32000), torch.bfloat16),
    LossCase("cross-entropy 512 x 32000, probabilities", (512, 32000), has_probabilities=True),
    LossCase("cross-entropy 256 x 128256", (256, 128256)),
    LossCase("cross-entropy 8 x 21 x 256 x 256", (8, 21, 256, 256)),
    LossCase("cross-entropy 8 x 21 x 256 x 256 channels_last", (8, 21, 256, 256), is_channels_last=True),
]
