"""Cross-entropy with process_group, in a group of this process alone: which logits the kernels take, and how.

Groups of several processes are in ``distributed_loss.py``.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from common import DTYPES, assert_no_worse, kernel_calls, threads
from fastopt._build import native
from loss_helpers import EVERY_SIZE, NONE, peak, streaming_beyond

cross_entropy = fastopt.functional.cross_entropy


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def group():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=1, store=fake.FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def make(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype)
    dim = 1 if len(shape) > 1 else 0
    return logits, torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=generator)


def loss_and_grad(function, logits, target, slope=3.0, **options):
    x = logits.detach().requires_grad_()
    loss = function(x, target, **options)
    (loss.float() if loss.dtype in DTYPES[2:] else loss).sum().mul(slope).backward()
    return loss.detach(), x.grad


LAYOUTS = [
    ("rows", lambda: make((9, 170))[0], True),
    ("of more classes than a block", lambda: make((3, 5000))[0], True),
    ("one position", lambda: make((130,))[0], True),
    ("rows with a gap", lambda: make((9, 300))[0][:, 40:240], True),
    ("one row, many times", lambda: make((1, 150))[0].expand(9, 150), True),
    ("few classes", lambda: make((9, 64))[0], False),
    ("columns", lambda: make((100, 9))[0].t(), False),
    ("every second class", lambda: make((9, 200))[0][:, ::2], False),
    ("images", lambda: make((2, 70, 5))[0], False),
    ("no rows", lambda: make((0, 70))[0], False),
]


@pytest.mark.native
@pytest.mark.parametrize(("make_logits", "takes"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_kernels_take_wide_rows_and_torch_the_rest(make_logits, takes, group):
    logits = make_logits()
    dim = 1 if logits.dim() > 1 else 0
    n_classes = logits.shape[dim]
    positions = logits.shape[:dim] + logits.shape[dim + 1 :]
    target = (torch.arange(positions.numel()) * 13 % n_classes).view(positions)
    weight = torch.linspace(0.5, 2, n_classes)
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
    before = kernel_calls("cross_entropy")
    ours = loss_and_grad(cross_entropy, logits, target, process_group=group, **options)
    assert kernel_calls("cross_entropy") == before + 2 * takes
    torchs = loss_and_grad(F.cross_entropy, logits, target, **options)
    truth = loss_and_grad(F.cross_entropy, logits.double(), target, **{**options, "weight": weight.double()})
    for found, reference, exact in zip(ours, torchs, truth, strict=True):
        assert_no_worse(found, reference, exact, slack=4)


@pytest.mark.native
def test_a_dispatch_mode_sees_every_operator(group):
    logits, target = make((9, 100))
    expected = loss_and_grad(F.cross_entropy, logits, target)
    before = kernel_calls("cross_entropy")
    with Nothing():
        found = loss_and_grad(cross_entropy, logits, target, process_group=group)
    assert kernel_calls("cross_entropy") == before
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n_classes", [65, 100, 1003, 2048, 4099])  # ends anywhere in a line, a group and a block
def test_threads_and_streaming_change_no_bit(n_classes, smoothing, dtype, group):
    wide, target = make((40, n_classes + 3), dtype)
    options = {"process_group": group, "label_smoothing": smoothing, "weight": wide[0, :n_classes].abs()}
    target = target.clamp(max=n_classes - 1)
    target[::5] = -100
    results = []
    for n_threads, n_bytes in ((1, NONE), (2, NONE), (1, EVERY_SIZE), (2, EVERY_SIZE)):
        with threads(n_threads), streaming_beyond(n_bytes):
            results.append(loss_and_grad(cross_entropy, wide[:, 2 : n_classes + 2], target, **options))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("n_classes", [5, 100])
def test_ignored_rows_are_zero_for_any_logits(n_classes, group):
    logits, target = make((6, n_classes))
    logits[:3], target[:3] = torch.nan, -100
    loss, grad = loss_and_grad(cross_entropy, logits, target, process_group=group, reduction="none")
    assert (loss[:3] == 0).all()
    assert (grad[:3] == 0).all()
    expected = loss_and_grad(F.cross_entropy, logits[3:], target[3:], reduction="none")
    torch.testing.assert_close(loss[3:], expected[0])
    torch.testing.assert_close(grad[3:], expected[1])


@pytest.mark.parametrize("n_classes", [5, 3000])
@pytest.mark.parametrize("offset", [1.0, 1e4, 1e20, -1e20])
def test_equal_logits_give_log_c(n_classes, offset, group):
    logits = torch.full((4, n_classes), offset)
    loss, grad = loss_and_grad(cross_entropy, logits, torch.arange(4), slope=1.0, process_group=group)
    torch.testing.assert_close(loss, torch.tensor(float(n_classes)).log())
    expected = torch.full((4, n_classes), 1 / n_classes / 4)
    expected[range(4), range(4)] -= 1 / 4
    torch.testing.assert_close(grad, expected)


@pytest.mark.native
def test_a_loss_takes_its_gradient_and_little_more(group):
    logits, target = make((512, 4000))
    logits = logits.requires_grad_() * 1
    fastopt.empty_cache()
    n_bytes = peak(lambda: torch.autograd.grad(cross_entropy(logits, target, process_group=group), logits))
    assert 0.9 < n_bytes / (logits.numel() * 4) < 1.1


@pytest.mark.native
def test_freed_logits_raise(group):
    logits, target = make((8, 100))
    leaf = logits.requires_grad_()
    logits = leaf * 1
    loss = cross_entropy(logits, target, process_group=group)
    logits.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        loss.backward()
    with pytest.raises(RuntimeError):
        cross_entropy(logits.detach(), target, process_group=group)


@pytest.mark.native
def test_arguments_of_the_module_are_checked_before_they_are_read():
    library = native.module()
    x, kept, target = torch.randn(4, 100), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    weight, numbers = torch.ones(100), torch.ones(5, 4, dtype=torch.float64)
    good = {"input": x, "target": target, "is_kept": kept, "weight": weight, "numbers": numbers}
    bad = [
        ("is_kept", kept[:3]),
        ("is_kept", kept.long()),
        ("weight", weight[:99]),
        ("weight", weight.double()),
        ("weight", torch.ones(200)[::2]),
        ("target", target[:3]),
        ("target", target.int()),
        ("numbers", numbers[:4]),
        ("numbers", numbers.float()),
        ("numbers", numbers.t().contiguous().t()),
    ]
    for name, value in bad:
        given = {**good, name: value}
        with pytest.raises(RuntimeError, match=f"{name} must be a contiguous CPU tensor"):
            library.cross_entropy_shard_gradient(*given.values(), 0.1, True)
        if name in ("is_kept", "weight"):
            with pytest.raises(RuntimeError, match=f"{name} must be a contiguous CPU tensor"):
                library.cross_entropy_shard_totals(x, given["is_kept"], given["weight"], True)
    far = torch.tensor([-1, 100, 2**62, -(2**63)])  # another process's classes
    grad = library.cross_entropy_shard_gradient(x, far, kept, weight, numbers, 0.0, True)
    assert grad.shape == x.shape
    assert (grad > 0).all()
