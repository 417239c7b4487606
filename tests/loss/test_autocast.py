"""Under autocast 16-bit logits go to the kernel as they are; the loss is float32, and no farther from the truth."""

import pytest
import torch
import torch.nn.functional as F

import fastopt
from common import HALVES, assert_no_worse, kernel_calls
from loss_cases import make_values

pytestmark = pytest.mark.native

cross_entropy = fastopt.functional.cross_entropy

# Shape, what the logits' type is given to beside them, options, whether the kernel takes them as they are.
CASES = {
    "rows": ((64, 1000), {}, True),
    "narrow": ((300, 10), {}, True),
    "images": ((3, 21, 8, 8), {}, True),
    "few positions": ((64, 10, 2), {}, True),
    "one row": ((50,), {}, True),
    "sum": ((64, 100), {"reduction": "sum"}, True),
    "smoothing": ((64, 100), {"label_smoothing": 0.1}, True),
    "ignored": ((64, 100), {"ignore_index": 3}, True),
    "weight": ((64, 100), {"weight": torch.float32}, True),
    "weight of 16 bits": ((64, 100), {"weight": "logits", "label_smoothing": 0.1}, True),
    "probabilities": ((64, 100), {"target": "logits"}, True),
    "probabilities in float32": ((64, 100), {"target": torch.float32}, False),
    "none": ((64, 100), {"reduction": "none"}, False),
}


def arguments_of(case, dtype):
    shape, options, _ = CASES[case]
    options = dict(options)
    class_dim = 1 if len(shape) > 1 else 0
    n_classes = shape[class_dim]
    x = make_values(shape, dtype, scale=2.0).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    positions = shape[:class_dim] + shape[class_dim + 1 :]
    target = torch.randint(0, n_classes, positions, generator=generator)
    if "target" in options:
        kind = options.pop("target")
        probabilities = torch.rand(shape, generator=generator).softmax(class_dim)
        target = probabilities.to(dtype if kind == "logits" else kind)
    if "weight" in options:
        kind = options["weight"]
        options["weight"] = torch.rand(n_classes, generator=generator).to(dtype if kind == "logits" else kind)
    return x, target, options


def loss_and_grad(function, x, target, options, factor=1.0):
    loss = function(x, target, **options)
    return loss, torch.autograd.grad(loss.sum() * factor, x)[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_torchs(case, dtype):
    x, target, options = arguments_of(case, dtype)
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in {"target": target, **options}.items()
    }
    for factor in (1.0, 1 / 3, 1 / 3):
        with torch.autocast("cpu", torch.bfloat16):
            ours = loss_and_grad(cross_entropy, x, target, options, factor)
            theirs = loss_and_grad(F.cross_entropy, x, target, options, factor)
        truths = loss_and_grad(F.cross_entropy, x.detach().double().requires_grad_(), **_split(wide), factor=factor)
        for found, reference, truth in zip(ours, theirs, truths, strict=True):
            assert found.dtype == reference.dtype
            assert_no_worse(found, reference, truth)


def _split(wide):
    wide = dict(wide)
    return {"target": wide.pop("target"), "options": wide}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_not_copied(case, dtype):
    """The program holds what the loss saved: for the kernel the logits themselves, of their own type."""
    x, target, options = arguments_of(case, dtype)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        before = kernel_calls("cross_entropy")
        cross_entropy(x, target, **options)
    assert kernel_calls("cross_entropy") == before + 1
    has_wide_logits = any(t.dtype == torch.float32 and t.shape == x.shape and t.is_leaf is False for t in saved)
    assert has_wide_logits is not CASES[case][2]


@pytest.mark.parametrize("dtype", HALVES)
def test_second_derivatives_are_torchs(dtype):
    x, target, options = arguments_of("weight", dtype)

    def second(function):
        with torch.autocast("cpu", torch.bfloat16):
            (first,) = torch.autograd.grad(function(x, target, **options), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(cross_entropy), second(F.cross_entropy))
