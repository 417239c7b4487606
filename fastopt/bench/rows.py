"""The rows of a sweep: all optimizers and losses of fastopt, by options, sizes, layouts and dtypes; and their calls."""

from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F

import fastopt

from . import work
from .cases import INDEX_BYTES, LENET, OptimizerCase, suffix
from .providers import OPTIMIZERS, NotOffered

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Beside the defaults of each optimizer that fastopt has.
OPTIMIZER_OPTIONS = (
    ("SGD", dict(momentum=0.9)),
    ("SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.01)),
    ("RMSprop", dict(momentum=0.9, centered=True)),
    ("Adam", dict(weight_decay=0.01)),
    ("Adam", dict(amsgrad=True)),
    ("AdamW", dict(amsgrad=True, maximize=True)),
)
MODELS = (
    ("one of 10", ((10,),)),
    ("4 tensors, 0.8 k", ((64, 8), (64,), (4, 64), (4,))),
    ("LeNet, 44 k", LENET),
    ("300 tensors of 64", ((64,),) * 300),
    ("12 tensors, 1.6 M", ((512, 512), (512,)) * 6),
    ("3 tensors, 6 M", ((4000, 1000), (2000, 1000), (1000,))),
)

# Of each loss that fastopt has, the fields and options in which a row differs from the first.
LOSSES = (
    (
        "cross_entropy",
        (
            {},
            dict(label_smoothing=0.1),
            dict(reduction="none"),
            dict(reduction="sum"),
            dict(has_weight=True),
            dict(is_half_ignored=True),
            dict(target="probabilities"),
            dict(needs_grad=False),
            dict(layout="channels last"),
            dict(layout="transposed"),
            dict(layout="rows apart"),
        ),
    ),
)
SHAPES = (
    *((1, 10), (64, 2), (64, 10), (256, 100), (8192, 5), (128, 1000), (2048, 1000)),
    *((1, 32000), (128, 32000)),
    *((16, 10, 2), (1024, 10, 2), (8, 4000, 2), (512, 100, 4), (64, 1000, 8)),  # few positions after the classes
    *((4, 21, 64, 64), (2, 19, 256, 256)),
)
LAYOUTS = {
    "contiguous": lambda values: values,
    "channels last": lambda values: values.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda values: values.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda values: values.repeat_interleave(2, 0)[::2],
}
_LAYOUT_DIMS = {"channels last": (3, 4), "transposed": (2,), "rows apart": (2,)}


@dataclass(frozen=True)
class LossRow:
    """A loss forward and backward into a fresh gradient, or the loss alone."""

    function: str  # of fastopt.functional and torch.nn.functional
    shape: tuple
    dtype: torch.dtype
    target: str = "indices"  # or "probabilities", or "values" in [0, 1) of the shape of the input
    layout: str = "contiguous"
    has_weight: bool = False  # of each class
    is_half_ignored: bool = False
    needs_grad: bool = True
    options: dict = field(default_factory=dict)

    @property
    def name(self):
        traits = {
            self.target: self.target not in ("indices", "values"),
            self.layout: self.layout != "contiguous",
            "weight": self.has_weight,
            "half ignored": self.is_half_ignored,
            "no gradient": not self.needs_grad,
        }
        shown = [trait for trait, holds in traits.items() if holds] + _options(self.options)
        where = f"{' x '.join(map(str, self.shape))}{suffix(self.dtype)}"
        return ", ".join([f"{self.function.replace('_', '-')} {where}", *shown])

    @property
    def bytes_moved(self):
        n_positions = prod(self.shape) // self.shape[1]
        n_bytes = prod(self.shape) * self.dtype.itemsize
        n_target = INDEX_BYTES * n_positions if self.target == "indices" else n_bytes
        return n_bytes // (2 if self.is_half_ignored else 1) + n_target + n_bytes * self.needs_grad

    def calls(self):
        """The call of each provider, by name."""
        generator = torch.Generator().manual_seed(0)
        inputs = LAYOUTS[self.layout](torch.randn(self.shape, generator=generator).to(self.dtype))
        options = dict(self.options)
        if self.target == "indices":
            target = torch.randint(self.shape[1], (self.shape[0], *self.shape[2:]), generator=generator)
            if self.is_half_ignored:
                target.view(-1)[::2] = -100
        else:
            target = torch.rand(self.shape, generator=generator)
            target = (target / target.sum(1, keepdim=True) if self.target == "probabilities" else target).to(self.dtype)
        if self.has_weight:
            options["weight"] = torch.rand(self.shape[1], generator=generator).to(self.dtype)
        inputs.requires_grad_(self.needs_grad)

        def call_of(function):
            loss = function(inputs, target, **options)
            ones = torch.ones_like(loss) if loss.dim() else None

            def call():
                inputs.grad = None
                loss = function(inputs, target, **options)
                if self.needs_grad:
                    loss.backward(ones)

            return call

        return {
            name: call_of(getattr(of, self.function)) for name, of in (("torch", F), ("fastopt", fastopt.functional))
        }


class OptimizerRow(OptimizerCase):
    """A step."""

    def calls(self):
        """The call of each provider that updates the parameters as torch's for-loop does, by name."""
        ready, calls, n_changed_first = work.prepare(self, "cpu"), {}, None
        for provider in OPTIMIZERS:
            if provider.package not in ("torch", "fastopt") or provider.compiles:
                continue
            try:
                started = ready.start(provider)
                started.call()
            except (NotOffered, RuntimeError, TypeError, ValueError):
                if provider.is_torch:
                    continue
                raise
            pairs = zip(started.results(), ready.params, strict=True)
            n_changed = sum(torch.count_nonzero(after != before).item() for after, before in pairs)
            n_changed_first = n_changed if n_changed_first is None else n_changed_first  # the for-loop's
            # torch 2.13's fused SGD updates a few elements at the end of 16-bit tensors, and leaves the others.
            if n_changed > 0.9 * n_changed_first:
                calls[provider.name] = started.call
        return calls


def rows(rng=None, dtypes=DTYPES):
    """All rows of the tables; with a ``random.Random`` of shapes that it draws."""
    shapes = SHAPES if rng is None else _drawn_shapes(rng)
    models = MODELS if rng is None else list(_drawn_models(rng))
    steps = [(name, {}) for name in fastopt.optim.__all__ if hasattr(torch.optim, name)]
    steps += [(name, options) for name, options in OPTIMIZER_OPTIONS if hasattr(fastopt.optim, name)]
    for name, options in steps:
        label, moves = " ".join([name, *_options(options)]), _moves(name, options)
        for model, its_shapes in models:
            yield from (OptimizerRow(label, name, options, moves, model, its_shapes, dtype) for dtype in dtypes)
    for function, variants in LOSSES:
        for variant in variants if hasattr(fastopt.functional, function) else ():
            fields = {key: value for key, value in variant.items() if key in LossRow.__dataclass_fields__}
            options = {key: value for key, value in variant.items() if key not in fields}
            for shape in shapes:
                if len(shape) in _LAYOUT_DIMS.get(variant.get("layout"), (len(shape),)):
                    yield from (LossRow(function, shape, dtype, options=options, **fields) for dtype in dtypes)


def _options(options):
    return [key if value is True else f"{key}={value}" for key, value in options.items()]


def _moves(name, options):
    """Arrays that a step reads -> those that it writes: the states that torch keeps are both."""
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = getattr(torch.optim, name)([param], **options)
    optimizer.step()
    states = [key for key, value in optimizer.state[param].items() if torch.is_tensor(value) and value.dim()]
    return f"{' '.join(['param', 'grad', *states])} -> {' '.join(['param', *states])}"


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
