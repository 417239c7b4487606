"""The memory of large gradients: the block that was freed last is reused for the next one only."""

import gc
import threading

import pytest
import torch
import torch.nn.functional as F

import fastopt
from common import threads

pytestmark = pytest.mark.native

N_CLASSES = 3000
LARGE = 4 * N_CLASSES * 1000  # bytes of a gradient of 1000 rows


def gradient(n_rows=1000, seed=0):
    x = torch.randn(n_rows, N_CLASSES, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    target = torch.arange(n_rows) % N_CLASSES
    return torch.autograd.grad(fastopt.functional.cross_entropy(x, target), x)[0], x, target


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()
    fastopt.empty_cache()
    yield
    fastopt.empty_cache()


@pytest.mark.parametrize(
    ("n_rows", "is_reused"),
    [(1000, True), (990, True), (600, True), (400, False), (1200, False)],
)
def test_memory_of_a_freed_gradient_is_reused_for_one_of_about_its_size(n_rows, is_reused):
    grad, *_ = gradient()
    where = grad.data_ptr()
    del grad
    again, x, target = gradient(n_rows, seed=1)
    if is_reused:
        assert again.data_ptr() == where
    assert fastopt.empty_cache() == 0  # a block that was not reused is gone
    expected = torch.autograd.grad(F.cross_entropy(x, target), x)[0]
    torch.testing.assert_close(again, expected)


def test_one_block_is_kept_and_can_be_freed():
    grads = [gradient()[0] for _ in range(3)]
    assert fastopt.empty_cache() == 0
    del grads
    assert LARGE <= fastopt.empty_cache() < LARGE + 4e6
    assert fastopt.empty_cache() == 0


@pytest.mark.parametrize(
    "hold",
    [lambda g: g[1:], lambda g: g.numpy(), lambda g: g.untyped_storage(), lambda g: torch.utils.dlpack.from_dlpack(g)],
    ids=["view", "numpy", "storage", "dlpack"],
)
def test_memory_that_is_still_referenced_is_not_reused(hold):
    grad, *_ = gradient()
    expected = grad.clone()
    held = hold(grad)
    del grad
    other, *_ = gradient(seed=1)
    values = held if not isinstance(held, torch.UntypedStorage) else torch.empty(0).set_(held).view(1000, N_CLASSES)
    values = torch.as_tensor(values)
    assert torch.equal(values, expected[-len(values) :])
    assert other.data_ptr() != expected.data_ptr()


def test_a_gradient_may_grow():
    grad, *_ = gradient()
    grad.resize_(2000, N_CLASSES).fill_(1.0)
    del grad
    assert gradient()[0].isfinite().all()


def test_threads_do_not_share_a_block():
    expected = [gradient(seed=seed)[0].clone() for seed in range(4)]
    wrong = []

    def work(seed):
        for _ in range(10):
            if not torch.equal(gradient(seed=seed)[0], expected[seed]):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(count):
    expected = gradient()[0].clone()
    with threads(count):
        assert torch.equal(gradient()[0], expected)
