"""The tables of optimizers and of losses, one row each, which the benchmark, benchmarks/sweep.py and the demo share.

A new optimizer is one row of ``OPTIMIZERS``, a new loss one of ``LOSSES``; names, bytes and calls follow from it.
"""

import functools
from dataclasses import dataclass, field

import torch

import fastopt

from ..demo.models import MODELS as NETWORKS

LR = 1e-2  # of timed steps
BOTH, CPU, CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SMOOTHING = dict(label_smoothing=0.1)


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of fastopt with some options: a row of the sweep, and of the benchmark if it has a label."""

    name: str  # of the class
    options: dict = field(default_factory=dict)
    label: str = ""
    demo_lr: float | None = None  # the demo trains those that have one, by their label in lower case
    timed_options: dict = field(default_factory=dict)  # further ones where it is timed; names do not show them

    @property
    def torch_class(self):
        """None if there is nothing in torch to time or train beside it."""
        return getattr(torch.optim, self.name, None)

    @property
    def reference_class(self):
        """Results are compared with this one's: torch's class, or fastopt's own, then in float64."""
        return self.torch_class or getattr(fastopt, self.name)

    def timed(self, cls, params, **more):
        """An optimizer of the class ``cls`` as it is timed."""
        return cls(params, **{"lr": LR, **more, **self.options, **self.timed_options})

    @functools.cached_property
    def states(self):
        """Names of the states that are as large as a parameter; a step reads and writes each."""
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        optimizer = self.timed(self.reference_class, [param])
        optimizer.step()
        return [name for name, value in optimizer.state[param].items() if torch.is_tensor(value) and value.dim()]


OPTIMIZERS = (
    Optimizer("SGD", label="SGD", demo_lr=0.05),
    Optimizer("SGD", dict(momentum=0.9), "momentum", demo_lr=0.02),
    Optimizer("SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.01)),
    Optimizer("RMSprop", label="RMSprop", demo_lr=3e-4),
    # Gradients stay the same from step to step: a shorter memory would let the centered variance round to zero.
    Optimizer("RMSprop", dict(momentum=0.9, centered=True), "RMSprop centered, momentum", None, dict(alpha=0.99999)),
    Optimizer("Adam", label="Adam", demo_lr=1e-3),
    Optimizer("Adam", dict(weight_decay=0.01)),
    Optimizer("Adam", dict(amsgrad=True)),
    Optimizer("AdamW", label="AdamW", timed_options=dict(weight_decay=0.01)),  # torch's default, not all libraries'
    Optimizer("AdamW", dict(amsgrad=True, maximize=True)),
    Optimizer("Adagrad", label="Adagrad", demo_lr=0.01),
    Optimizer("Adadelta", label="Adadelta", demo_lr=1.0, timed_options=dict(lr=1.0)),
    Optimizer("NAdam", label="NAdam", demo_lr=1e-3),
    Optimizer("Lion", label="Lion"),
)


@dataclass(frozen=True)
class Loss:
    """A loss of fastopt.functional and torch.nn.functional. A variant is options, or a trait of :class:`LossCase`."""

    name: str
    target: str = "values"  # of the input's shape, in [0, 1); or "indices" of classes
    # Of the sweep.
    variants: tuple = ({}, dict(reduction="sum"), "no gradient")
    # Of the benchmark: where, of which dtype, the variant, shapes.
    timed: tuple = (
        (BOTH, FLOAT32, {}, (64, 10)),
        (CPU, FLOAT32, {}, (4096, 1000)),
        (CUDA, BFLOAT16, {}, (65536, 1000)),
    )


LOSSES = (
    Loss(
        "cross_entropy",
        "indices",
        (
            *({}, SMOOTHING, dict(reduction="none"), dict(reduction="sum"), "weight", "half ignored", "probabilities"),
            *("no gradient", "channels_last", "transposed", "rows apart"),
        ),
        (
            (BOTH, FLOAT32, {}, (64, 10)),
            (CPU, FLOAT32, {}, (1024, 10), (128, 1000), (4096, 1000)),
            (CPU, BFLOAT16, {}, (4096, 1000)),
            (CPU, FLOAT32, {}, (512, 32000)),
            (CPU, FLOAT32, SMOOTHING, (512, 32000)),
            (CPU, BFLOAT16, {}, (512, 32000)),
            (CPU, FLOAT32, "probabilities", (512, 32000)),
            (CPU, FLOAT32, "in place", (512, 32000)),
            (CPU, FLOAT32, "no gradient", (512, 32000)),
            (CPU, FLOAT32, {}, (256, 128256)),
            (CUDA, FLOAT32, {}, (65536, 1000)),
            (CUDA, BFLOAT16, {}, (65536, 1000), (8192, 32000)),
            (CUDA, BFLOAT16, SMOOTHING, (8192, 32000)),
            (CUDA, BFLOAT16, "in place", (8192, 32000)),
            (CUDA, BFLOAT16, "no gradient", (8192, 32000)),
            # Rows that start at odd addresses, many classes, and fewer rows than multiprocessors.
            (CUDA, BFLOAT16, {}, (8192, 50257), (8192, 128256), (16, 128256)),
            (BOTH, FLOAT32, {}, (8, 21, 256, 256)),
            (BOTH, FLOAT32, "channels_last", (8, 21, 256, 256)),
        ),
    ),
    Loss("mse_loss"),
    Loss("l1_loss"),
)

# Shapes of tensors.
with torch.device("meta"):
    LENET, CNN = (tuple(tuple(p.shape) for p in NETWORKS[name]().parameters()) for name in ("lenet", "cnn"))
_ATTENTION = ((768,), (768,), (2304, 768), (2304,), (768, 768), (768,))
_FEED_FORWARD = ((768,), (768,), (3072, 768), (3072,), (768, 3072), (768,))
GPT2 = ((50257, 768), (1024, 768), *(12 * (_ATTENTION + _FEED_FORWARD)), (768,), (768,))

# On CUDA also in bfloat16 if True.
MODELS = (
    ("LeNet, 44 k in 10 tensors", LENET, False),
    ("MNIST CNN, 1.2 M in 8", CNN, False),
    ("1000 tensors of 64", ((64,),) * 1000, True),
    ("GPT-2 small, 124 M in 148", GPT2, True),
)
