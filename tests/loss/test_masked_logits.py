"""Masked logits: -inf, the lowest finite number and the usual large negative numbers, in any blocks of a row."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import devices
import fastopt
from common import DTYPES, to_device
from drawn_examples import N_EXAMPLES, drawn
from loss_cases import loss_and_grad, make_values, truth_of
from loss_helpers import assert_as_exact

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

INF = float("inf")
LOW = "the lowest finite number"
MASKS = {
    "-inf": [-INF],
    "lowest": [LOW],
    "-1e38": [-1e38],
    "-1e4": [-1e4],
    "-inf and lowest": [-INF, LOW],
    "mixed": [-INF, LOW, -1e38, -1e4],
}
BLOCK = 2048  # classes whose maximum the kernel of wide rows finds at once
cross_entropy = fastopt.functional.cross_entropy


def mask_values(names, dtype):
    lowest = torch.finfo(dtype).min
    return [lowest if value == LOW else max(value, -INF if value == -INF else lowest) for value in names]


def as_in_place(input, target, **options):
    return cross_entropy(input * 1, target, **options, inplace_backward=True)


@st.composite
def masked_rows(draw):
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**16))
    n_classes = draw(st.sampled_from([100, BLOCK, 2 * BLOCK, 3 * BLOCK])) - draw(st.integers(0, 99))
    x = make_values((draw(st.integers(1, 3)), n_classes), dtype, seed, draw(st.sampled_from([1.0, 10.0])))
    width = draw(st.sampled_from([BLOCK, BLOCK // 2, 64, 7]))
    masks = draw(st.lists(st.sampled_from([*MASKS, None, None]), min_size=2, max_size=8))
    for i, begin in enumerate(range(0, n_classes, width)):
        if masks[i % len(masks)] is not None:
            masked = x[:, begin : begin + width]
            values = torch.tensor(mask_values(MASKS[masks[i % len(masks)]], dtype), dtype=dtype, device="cpu")
            generator = torch.Generator().manual_seed(seed + i)
            masked.copy_(values[torch.randint(len(values), masked.shape, generator=generator, device="cpu")])
    generator = torch.Generator().manual_seed(seed + 1)
    options = {"reduction": draw(st.sampled_from(["mean", "none"]))}
    if draw(st.booleans()):
        weight = torch.randint(1, 5, (n_classes,), generator=generator, device="cpu") / 4
        options["weight"] = to_device(weight).to(dtype)
    if draw(st.booleans()):
        # A masked class has no probability, or every loss is infinite or huge.
        y = torch.where(x > -1e3, to_device(torch.rand(x.shape, generator=generator, device="cpu")), 0.0).to(dtype)
        target = torch.where(y.sum(1, keepdim=True) > 0, y / y.sum(1, keepdim=True).clamp_min(1e-3), y)
    else:
        # A masked target's loss is so large that no other error shows beside it.
        target = torch.where(x > -1e3, to_device(torch.rand(x.shape, generator=generator, device="cpu")), 0.0).argmax(1)
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1]))
        if dtype == torch.float64 and (x == torch.finfo(dtype).min).any():
            options["label_smoothing"] = 0.0  # torch's sum of such logits overflows, so it is no truth
    columns = draw(st.booleans())
    return (x.t().contiguous().t() if columns else x), target, options


@settings(drawn, max_examples=N_EXAMPLES or 400)
@given(masked_rows(), st.sampled_from([cross_entropy, as_in_place]))
def test_any_mask_gives_a_loss_and_gradient_as_exact_as_torchs(case, function):
    input, target, options = case
    ours = loss_and_grad(function, input, target, **options)
    theirs = loss_and_grad(F.cross_entropy, input, target, **options)
    for own, other, truth in zip(ours, theirs, truth_of(F.cross_entropy, input, target, **options), strict=True):
        assert_as_exact(own, other, truth, slack_in_float64=128)  # logits of 40 have rounded by so much
    without_grad = cross_entropy(input, target, **options)
    torch.testing.assert_close(without_grad, ours[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n_masked", [1, 64, 1024, 2048, 2049, 4095, 4096])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_blocks_of_a_row_may_be_masked(dtype, mask, n_masked):
    values = mask_values(MASKS[mask], dtype)
    x = make_values((2, 4200), dtype, scale=1.0)
    x[:, :n_masked] = torch.tensor(values, dtype=dtype).repeat(n_masked)[:n_masked]
    target = torch.tensor([4199, 4100])
    for probabilities in (False, True):
        y = F.one_hot(target, 4200).to(dtype) if probabilities else target
        for function in (cross_entropy, as_in_place):
            ours = loss_and_grad(function, x, y, reduction="none")
            theirs = loss_and_grad(F.cross_entropy, x, y, reduction="none")
            for own, other, truth in zip(ours, theirs, truth_of(F.cross_entropy, x, y, reduction="none"), strict=True):
                assert_as_exact(own, other, truth)


@pytest.mark.parametrize("sizes", [(9, 100), (9, 1100), (5, 4099), (2, 20_001)], ids=str)
@pytest.mark.parametrize("mask", ["lowest", "-1e38"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_smoothing_over_masked_classes_overflows_no_sooner_than_in_torch(dtype, mask, sizes):
    """Their sum is beyond the largest number long before their mean is."""
    x = make_values(sizes, dtype, scale=1.0)
    x[:, ::3] = mask_values(MASKS[mask], dtype)[0]
    target = torch.arange(sizes[0]) * 3 + 1
    for reduction in ("mean", "none"):
        options = {"label_smoothing": 0.1, "reduction": reduction}
        ours, theirs = (loss_and_grad(function, x, target, **options) for function in (cross_entropy, F.cross_entropy))
        for own, other, truth in zip(ours, theirs, truth_of(F.cross_entropy, x, target, **options), strict=True):
            assert_as_exact(own, other, truth)


def test_a_row_whose_first_half_is_the_lowest_number():
    """The mask that most attention and sampling code uses, first in the row."""
    x = make_values((1, 4096), scale=1.0)
    x[:, :2048] = torch.finfo(x.dtype).min
    target = torch.tensor([4095])
    expected = F.cross_entropy(x[:, 2048:].double(), target - 2048)
    torch.testing.assert_close(cross_entropy(x, target).double(), expected, rtol=1e-6, atol=0)
