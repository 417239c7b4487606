"""The table of loss cases: shapes and layouts of logits, options of the loss, and why each is there."""

import itertools
from dataclasses import dataclass

import torch

from common import to_device


@dataclass(frozen=True)
class Logits:
    sizes: tuple
    layout: str
    why: str

    def __str__(self):
        return f"{'x'.join(map(str, self.sizes))}-{self.layout}"

    @property
    def n_classes(self):
        return self.sizes[0] if len(self.sizes) == 1 else self.sizes[1]

    @property
    def positions(self):
        return () if len(self.sizes) == 1 else (self.sizes[0], *self.sizes[2:])

    def lay(self, values):
        """The values in this layout; memory around them holds NaN, which must not be read."""
        return _LAYOUTS[self.layout](values)


def _inside(values, make_view):
    view = make_view()
    view.copy_(values)
    return view


def _sliced(values):
    nan = values.new_full((*values.shape[:-1], values.shape[-1] + 3), float("nan"))
    return _inside(values, lambda: nan[..., 1:-2])


def _every_other(values, dim):
    sizes = list(values.shape)
    sizes[dim] *= 2
    nan = values.new_full(sizes, float("nan"))
    return _inside(values, lambda: nan.movedim(dim, 0)[::2].movedim(0, dim))


def _class_dim(values):
    return 0 if values.dim() == 1 else 1


_LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda x: x.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2),
    "sliced": _sliced,
    "rows_apart": lambda x: _every_other(x, 0),
    "classes_apart": lambda x: _every_other(x, _class_dim(x)),
    "expanded": lambda x: x[:1].expand(x.shape),
    "classes_expanded": lambda x: x[:, :1].expand(x.shape),
}

LOGITS = [
    Logits((5,), "contiguous", "one position, no batch"),
    Logits((100,), "classes_apart", "one position that must be gathered"),
    Logits((3, 1), "contiguous", "one class: loss and gradient are 0"),
    Logits((1, 7), "contiguous", "a tile with one lane in use"),
    Logits((33, 10), "contiguous", "narrow rows: a part of a tile; classes in blocks of 4 that overlap"),
    Logits((300, 3), "contiguous", "narrow rows: tiles of 64 and a rest; classes too few for a block of 4"),
    Logits((129, 5), "contiguous", "narrow rows: one position in the last tile"),
    Logits((7, 64), "contiguous", "the widest narrow row of float64"),
    Logits((7, 65), "contiguous", "the narrowest wide row of float64"),
    Logits((90, 127), "contiguous", "the widest narrow row of the others; a tile and two narrow ones"),
    Logits((7, 128), "contiguous", "the narrowest wide row of the others, where there are few"),
    Logits((23, 130), "contiguous", "wide rows: as many as are not yet many"),
    Logits((24, 223), "contiguous", "the widest narrow row of the others, where there are many; two narrow tiles"),
    Logits((41, 150), "contiguous", "three narrow tiles"),
    Logits((49, 224), "contiguous", "the narrowest wide row, however many there are"),
    Logits((11, 300), "contiguous", "wide rows: sums flushed at 256, a vector of 12 lanes, several rows in a task"),
    Logits((3, 2049), "contiguous", "wide rows: one class in a second block"),
    Logits((2, 5000), "contiguous", "wide rows: three blocks"),
    Logits((3, 10, 6), "contiguous", "columns: less than a vector"),
    Logits((2, 17, 20, 16), "contiguous", "columns: five tiles; 16 classes and one more"),
    Logits((2, 3, 23, 27), "contiguous", "columns: a run of 512 and a rest"),
    Logits((1, 600, 70), "contiguous", "columns: so many classes that a run is one tile"),
    Logits((2, 9, 2, 3, 3), "contiguous", "columns of a volume"),
    Logits((40, 6, 3), "contiguous", "columns: tiles of 21 images and a rest; runs of two steps that overlap"),
    Logits((3, 5, 70), "contiguous", "columns: tiles that begin and end amid an image"),
    Logits((9, 70, 9), "contiguous", "columns: tiles of 7 images and a narrow one; a block of 64 classes and a rest"),
    Logits((9, 130, 2), "contiguous", "columns: a tile of several images in four blocks of 64 classes"),
    Logits((9, 257, 2), "contiguous", "columns: wide, two positions: rows, in blocks of 64 classes and a rest"),
    Logits((2, 270, 7), "contiguous", "columns: wide, few positions: rows, in blocks of 4 that overlap"),
    Logits((2, 4100, 17), "contiguous", "columns: too many classes for a tile: rows, of three blocks"),
    Logits((5, 200), "transposed", "wide columns of one image, few positions: a narrow tile"),
    Logits((5, 300), "transposed", "wider columns of one image, few positions: rows"),
    Logits((3, 6, 1), "contiguous", "rows in a disguise of columns"),
    Logits((2, 5, 4, 3), "channels_last", "narrow rows of an image"),
    Logits((2, 70, 4, 3), "channels_last", "wide rows of an image"),
    Logits((300, 20), "transposed", "columns of one image, more than one tile"),
    Logits((33, 100), "transposed", "wide columns of one image: a tile"),
    Logits((35, 256), "transposed", "wide columns of one image: the most classes of a short tile"),
    Logits((35, 260), "transposed", "wide columns of one image: tasks of 12 positions and a rest"),
    Logits((3, 290), "transposed", "wide columns of one image: a task of two positions and one of one"),
    Logits((2, 5, 3, 4), "permuted", "positions in no walkable order: copied"),
    Logits((9, 10), "sliced", "narrow rows with a gap, misaligned"),
    Logits((5, 100), "sliced", "wide rows with a gap, misaligned"),
    Logits((2, 6, 3, 5), "sliced", "columns with gaps inside an image: copied"),
    Logits((2, 6, 5), "rows_apart", "columns with gaps between images"),
    Logits((30, 6, 5), "rows_apart", "columns with gaps between the images of a tile"),
    Logits((6, 100), "rows_apart", "every other row"),
    Logits((6, 10), "classes_apart", "every other class: copied"),
    Logits((6, 10), "expanded", "one row for all, stride 0"),
    Logits((6, 100), "expanded", "one wide row for all, stride 0"),
    Logits((6, 10), "classes_expanded", "class stride 0"),
]

# One shape for each loop: narrow rows, wide rows in two blocks, columns.
LOOPS = [
    Logits((37, 10), "contiguous", "narrow rows"),
    Logits((5, 2100), "contiguous", "wide rows"),
    Logits((2, 12, 300), "contiguous", "columns"),
]


@dataclass(frozen=True)
class Options:
    kind: str  # "index" or "probability"
    has_weight: bool
    smoothing: float
    ignored: str  # "none", "some" (-100), "class" (a class in range), "all"
    reduction: str

    def __str__(self):
        parts = [self.kind, "weight" if self.has_weight else "", f"smoothing={self.smoothing}"]
        return "-".join(filter(None, [*parts, f"ignored={self.ignored}", self.reduction]))

    @property
    def ignore_index(self):
        return 0 if self.ignored == "class" else -100

    def make_target(self, logits, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "probability":
            values = to_device(torch.rand(logits.sizes, generator=generator, device="cpu", dtype=torch.float64))
            return (values / values.sum(_class_dim(values), keepdim=True)).to(dtype)
        target = to_device(torch.randint(logits.n_classes, logits.positions, generator=generator, device="cpu"))
        if self.ignored == "some":
            every_third = torch.arange(target.numel()).reshape(target.shape) % 3 == 1
            target = target.masked_fill(every_third, -100)
        return torch.full_like(target, -100) if self.ignored == "all" else target

    def make(self, logits, dtype, seed=0):
        """Target and keyword arguments of the loss; weights are exact in every dtype."""
        generator = torch.Generator().manual_seed(seed + 1)
        weight = None
        if self.has_weight:
            weight = torch.randint(1, 9, (logits.n_classes,), generator=generator, device="cpu")
            weight = to_device(weight).to(dtype) / 4
        return self.make_target(logits, dtype, seed), {
            "weight": weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.smoothing,
        }


# 0.1 mixes target and uniform part; 1.0 leaves the target nothing.
OPTIONS = [
    Options(kind, has_weight, smoothing, ignored, reduction)
    for (kind, ignored), has_weight, smoothing, reduction in itertools.product(
        [("index", "none"), ("index", "some"), ("index", "class"), ("index", "all"), ("probability", "none")],
        [False, True],
        [0.0, 0.1, 1.0],
        ["mean", "sum", "none"],
    )
]

# One for each kind of target that a kernel is compiled for.
KINDS = [
    Options("index", False, 0.0, "some", "mean"),
    Options("index", False, 0.1, "some", "mean"),
    Options("index", True, 0.1, "some", "mean"),
    Options("probability", False, 0.1, "none", "mean"),
    Options("probability", True, 0.1, "none", "mean"),
]


def make_values(sizes, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sizes, generator=generator, device="cpu", dtype=torch.float64) * scale
    return to_device(values).to(dtype)


def widen(value):
    """Floating-point tensors among arguments in float64; the rest as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def loss_and_grad(function, input, target, grad_output=None, **options):
    """The loss and the gradient of its sum, or of its product with grad_output."""
    x = input.detach().requires_grad_()
    loss = function(x, target, **options)
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, x, grad_output.to(loss.dtype))
    return loss.detach(), grad


def truth_of(function, input, target, grad_output=None, **options):
    """loss_and_grad in float64."""
    options = {name: widen(value) for name, value in options.items()}
    return loss_and_grad(function, widen(input), widen(target), grad_output, **options)


def slack_of(logits, dtype):
    """Units by which a result may be farther from the truth than torch's.

    In float64 torch's own loss is the truth, so its error counts as 0, though it adds up columns one by one.
    """
    return max(64, logits.n_classes / 8) if dtype == torch.float64 else 4
