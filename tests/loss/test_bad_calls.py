"""Odd arguments of cross-entropy end as in torch: its value and gradient, or its exception to the letter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastopt

NAN, INF = float("nan"), float("inf")
X, T, W = torch.linspace(-1, 1, 20).view(4, 5), torch.tensor([0, 1, 2, 3]), torch.linspace(0.5, 1, 5)

# Arguments by position and by name; dtypes, shapes and targets out of range are in test_refused_calls.py.
ROWS = {
    "ignore_index 1.5": ((X, T), dict(ignore_index=1.5)),
    "ignore_index None": ((X, T), dict(ignore_index=None)),
    "ignore_index text": ((X, T), dict(ignore_index="0")),
    "ignore_index True": ((X, T), dict(ignore_index=True)),
    "ignore_index 2**63": ((X, T), dict(ignore_index=2**63)),
    "ignore_index -2**63": ((X, T), dict(ignore_index=-(2**63))),
    "ignore_index np": ((X, T), dict(ignore_index=np.int64(2))),
    "ignore_index tensor": ((X, T), dict(ignore_index=torch.tensor(2))),
    "ignore_index float tensor": ((X, T), dict(ignore_index=torch.tensor(2.5))),
    "smoothing None": ((X, T), dict(label_smoothing=None)),
    "smoothing text": ((X, T), dict(label_smoothing="0.1")),
    "smoothing int": ((X, T), dict(label_smoothing=1)),
    "smoothing True": ((X, T), dict(label_smoothing=True)),
    "smoothing tensor": ((X, T), dict(label_smoothing=torch.tensor(0.1))),
    "smoothing np32": ((X, T), dict(label_smoothing=np.float32(0.1))),
    "smoothing complex": ((X, T), dict(label_smoothing=0.1j)),
    "smoothing inf": ((X, T), dict(label_smoothing=INF)),
    "smoothing huge int": ((X, T), dict(label_smoothing=10**400)),
    "smoothing grad": ((X, T), dict(label_smoothing=torch.tensor(0.1, requires_grad=True))),
    "reduction None": ((X, T), dict(reduction=None)),
    "reduction 1": ((X, T), dict(reduction=1)),
    "reduction MEAN": ((X, T), dict(reduction="MEAN")),
    "reduction elementwise_mean": ((X, T), dict(reduction="elementwise_mean")),
    "reduction batchmean": ((X, T), dict(reduction="batchmean")),
    "reduction list": ((X, T), dict(reduction=["mean"])),
    "weight list": ((X, T), dict(weight=[1.0, 2.0, 3.0, 4.0, 5.0])),
    "weight np": ((X, T), dict(weight=np.ones(5, np.float32))),
    "weight number": ((X, T), dict(weight=2.0)),
    "weight expanded": ((X, T), dict(weight=torch.ones(1).expand(5))),
    "weight strided": ((X, T), dict(weight=torch.rand(10)[::2])),
    "weight neg": ((X, T), dict(weight=torch._neg_view(-W))),
    "weight nan": ((X, T), dict(weight=torch.full((5,), NAN))),
    "weight negative": ((X, T), dict(weight=-W)),
    "weight huge": ((X, T), dict(weight=torch.tensor([1.0, 1e37, 1, 1, 1]))),
    "weight sparse": ((X, T), dict(weight=W.to_sparse())),
    "weight empty": ((X, T), dict(weight=torch.ones(0))),
    "weight complex": ((X, T), dict(weight=W.to(torch.complex64))),
    "weight int32": ((X, T), dict(weight=torch.ones(5, dtype=torch.int32))),
    "weight float8": ((X, T), dict(weight=W.to(torch.float8_e4m3fn))),
    "target neg view": ((X, torch._neg_view(-T)), {}),
    "target expanded": ((X, torch.tensor([3]).expand(4)), {}),
    "target strided": ((X, torch.arange(8)[::2] % 5), {}),
    "target col": ((X, T[:, None]), {}),
    "target neg probs": ((X, torch._neg_view(-torch.rand(4, 5))), {}),
    "probs nan": ((X, torch.full((4, 5), NAN)), {}),
    "probs negative": ((X, -torch.rand(4, 5)), {}),
    "probs expanded": ((X, torch.rand(1, 5).expand(4, 5)), {}),
    "probs complex": ((X, torch.rand(4, 5).to(torch.complex64)), {}),
    "probs bool": ((X, torch.rand(4, 5) > 0.5), {}),
    "probs meta": ((X, torch.rand(4, 5, device="meta")), {}),
    "probs sparse": ((X, torch.rand(4, 5).to_sparse()), {}),
    "target csr": ((X, torch.rand(4, 5).to_sparse_csr()), {}),
    "logits csr": ((X.to_sparse_csr(), T), {}),
    "logits nested": ((torch.nested.nested_tensor([X, X]), T), {}),
    "logits conj": ((X.to(torch.complex64).conj(), T), {}),
    "logits int8": ((X.to(torch.int8), T), {}),
    "quant target": ((X, torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)), {}),
    "no args": ((), {}),
    "one arg": ((X,), {}),
    "unknown kw": ((X, T), dict(smoothing=0.1)),
    "twice": ((X, T), dict(input=X)),
    "size_average text": ((X, T), dict(size_average="no")),
    "reduce 0": ((X, T), dict(reduce=0)),
    "0-dim": ((torch.tensor(1.0), torch.tensor(1.0)), {}),
    "6-dim": ((torch.randn(2, 3, 1, 1, 1, 2), torch.zeros(2, 1, 1, 1, 2, dtype=torch.long)), {}),
    "target batch0": ((X, T[:0]), {}),
    "inference": ((X.clone(), T), {}),
    "half logits, float probabilities": ((X.half(), torch.rand(4, 5)), {}),
    "half weight mismatch": ((X.half(), T), dict(weight=W)),
    "bf16 weight mismatch": ((X.bfloat16(), T), dict(weight=W)),
    "logits complex32": ((X.to(torch.complex32), T), {}),
    "uint16 target": ((X, T.to(torch.uint16)), {}),
    "uint64 target": ((X, T.to(torch.uint64)), {}),
    "set target": ((X, {0, 1}), {}),
    "list target": ((X, [0, 1, 2, 3]), {}),
}


def outcome(function, args, options, requires_grad):
    args = list(args)
    if requires_grad:
        args[0] = args[0].detach().clone().requires_grad_()
    try:
        loss = function(*args, **options)
        if requires_grad and not loss.is_meta:
            return loss.detach(), torch.autograd.grad(loss.sum(), args[0])[0]
    except Exception as failure:
        return type(failure), str(failure).replace("_cross_entropy()", "cross_entropy()")
    return loss, None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_odd_arguments_of_the_loss_end_as_in_torch(row):
    args, options = ROWS[row]
    can_have_grad = (
        bool(args) and args[0].layout == torch.strided and not args[0].is_nested and args[0].is_floating_point()
    )
    for requires_grad in (False, True)[: 1 + can_have_grad]:
        ours = outcome(fastopt.functional.cross_entropy, args, options, requires_grad)
        theirs = outcome(F.cross_entropy, args, options, requires_grad)
        if isinstance(theirs[0], torch.Tensor):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        else:
            assert ours == theirs


@pytest.mark.slow
@pytest.mark.native
def test_more_than_2_to_the_31_logits_are_indexed_in_64_bits():
    """Zeros that the system has not even put into memory: log C, from a target in the last row too."""
    n_classes = 2**16
    x = torch.zeros(2**15 + 1, n_classes, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    target = torch.zeros(len(x), dtype=torch.long)
    target[-1] = n_classes - 1
    x[-1, -1] = 8.0
    losses = fastopt.functional.cross_entropy(x, target, reduction="none")
    assert (losses[:-1] - losses[0]).abs().max() == 0
    torch.testing.assert_close(losses[0], torch.tensor(n_classes).log().bfloat16())
    torch.testing.assert_close(losses[-1], F.cross_entropy(x[-1].float(), target[-1]).bfloat16())
    target[-1] = n_classes
    with pytest.raises(IndexError, match="Target 65536 is out of bounds"):
        fastopt.functional.cross_entropy(x, target)
