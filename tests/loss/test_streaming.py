"""Gradients larger than the caches are written past them: every bit is that of gradients that are not."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastopt
from common import DTYPES, assert_no_worse, threads
from loss_cases import KINDS, LOGITS, Logits, Options, loss_and_grad, make_values, truth_of
from loss_helpers import EVERY_SIZE, NONE, streaming_beyond

pytestmark = pytest.mark.native

cross_entropy = fastopt.functional.cross_entropy
options_of_kind = pytest.mark.parametrize("options", KINDS, ids=str)


def streamed_and_not(x, target, **options):
    results = []
    for n_bytes in (EVERY_SIZE, NONE):
        with streaming_beyond(n_bytes):
            results.append(loss_and_grad(cross_entropy, x, target, **options))
    return results


def assert_same_bits(x, target, **options):
    for streamed, kept in zip(*streamed_and_not(x, target, **options), strict=True):
        assert torch.equal(streamed.nan_to_num(7.0), kept.nan_to_num(7.0))
        assert torch.equal(streamed.isnan(), kept.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@options_of_kind
@pytest.mark.parametrize("logits", LOGITS, ids=str)
def test_a_streamed_gradient_has_the_same_bits(logits, options, dtype):
    target, arguments = options.make(logits, dtype)
    assert_same_bits(logits.lay(make_values(logits.sizes, dtype)), target, **arguments)


# Rows begin at every place in a cache line, and end anywhere in one, in a group of 64 and in a block of 2048.
WIDTHS = [*range(65, 200), *range(1000, 1004), *range(2045, 2053), 2112, 4099]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_streamed_rows_of_every_width_have_the_same_bits(dtype, kind):
    for n_classes in WIDTHS:
        logits = Logits((19, n_classes), "contiguous", "every place in a line")
        target, arguments = Options(kind, False, 0.1, "none", "mean").make(logits, dtype)
        assert_same_bits(make_values(logits.sizes, dtype), target, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_positions", [1, 15, 16, 63, 64, 65, 255, 256, 257, 300, 511, 513, 1025])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_streamed_images_of_every_size_have_the_same_bits(dtype, n_positions, layout):
    logits = Logits((3, 5, n_positions), layout, "runs that begin and end anywhere in a line")
    target, arguments = KINDS[0].make(logits, dtype)
    assert_same_bits(logits.lay(make_values(logits.sizes, dtype)), target, **arguments)


@pytest.mark.parametrize("ignored", list(itertools.product([False, True], repeat=4)), ids=str)
def test_ignored_rows_among_streamed_rows_have_the_same_bits(ignored):
    x = make_values((4, 3001))
    target = torch.where(torch.tensor(ignored), -100, torch.tensor([0, 63, 2048, 3000]))
    assert_same_bits(x, target, reduction="sum")
    with streaming_beyond(EVERY_SIZE):
        _, grad = loss_and_grad(cross_entropy, x, target, reduction="sum")
    assert [not row.any() for row in grad] == list(ignored)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_maximum_that_changes_in_every_block_has_the_same_bits(order):
    steps = torch.arange(20000, dtype=torch.float32) / 100
    x = (steps if order == "rising" else steps.flip(0)) + make_values((5, 20000))
    target = torch.tensor([0, 1999, 2000, 10000, 19999])
    assert_same_bits(x, target)
    assert_same_bits(x, target, label_smoothing=0.1)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [(33, 2500), (5, 7, 3000)], ids=str)
def test_any_number_of_threads_streams_the_same_bits(n_threads, sizes):
    logits = Logits(sizes, "contiguous", "several tasks a thread")
    x = make_values(sizes)
    target, arguments = KINDS[1].make(logits, torch.float32)
    with streaming_beyond(EVERY_SIZE):
        expected = loss_and_grad(cross_entropy, x, target, **arguments)
        with threads(n_threads):
            results = loss_and_grad(cross_entropy, x, target, **arguments)
    for own, one in zip(results, expected, strict=True):
        assert torch.equal(own, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradients_stream_by_default(dtype):
    """50257 classes: no row but the first begins at the beginning of a line."""
    x = make_values((200, 50257), dtype)
    target = torch.arange(200) * 251
    ours = loss_and_grad(cross_entropy, x, target)
    theirs = loss_and_grad(F.cross_entropy, x, target)
    truth = truth_of(F.cross_entropy, x, target)
    for own, other, exact in zip(ours, theirs, truth, strict=True):
        assert_no_worse(own, other, exact)
    for streamed, kept in zip(*streamed_and_not(x, target), strict=True):
        assert torch.equal(streamed, kept)
