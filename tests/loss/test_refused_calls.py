"""Calls of cross-entropy that torch refuses, or nearly: dtypes, shapes and targets out of range end as in torch."""

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import attempt
from loss_cases import make_values

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

cross_entropy = fastopt.functional.cross_entropy
NAN = float("nan")


def assert_same_outcome(args, options):
    theirs = attempt(lambda: F.cross_entropy(*args, **options))
    ours = attempt(lambda: cross_entropy(*args, **options))
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), f"torch accepts this, we raise {ours}"
        assert (ours.dtype, ours.device, ours.layout) == (theirs.dtype, theirs.device, theirs.layout)
        if theirs.device.type == "meta":
            assert ours.shape == theirs.shape
        else:
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    else:
        assert ours == theirs


@pytest.mark.parametrize("sizes", [(0,), (0, 5), (5, 0), (0, 0), (0, 5, 3), (2, 5, 0), (2, 0, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_empty_logits_give_what_torch_gives(sizes, reduction, kind):
    positions = sizes[:1] + sizes[2:] if len(sizes) > 1 else ()
    target = torch.zeros(positions, dtype=torch.long) if kind == "index" else torch.zeros(sizes)
    assert_same_outcome((torch.zeros(sizes), target), {"reduction": reduction})


X, T = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
BAD_TARGETS = [
    ("target 5 of 5", (X, torch.tensor([0, 5, 1, 1])), {}),
    ("target -1", (X, torch.tensor([0, -1, 1, 1])), {}),
    ("target -100 when another is ignored", (X, torch.tensor([0, -100, 1, 1])), {"ignore_index": -1}),
    ("target far above", (X, torch.tensor([0, 1, 2**62, 1])), {}),
    ("target far below", (X, torch.tensor([0, 1, 1, -(2**63)])), {}),
    ("target outside with smoothing", (X, torch.tensor([0, 9, 1, 1])), {"label_smoothing": 0.1, "reduction": "sum"}),
    ("target outside, unreduced", (X, torch.tensor([0, 1, 1, 9])), {"reduction": "none"}),
    ("target outside, wide rows", (torch.randn(2, 100), torch.tensor([3, 100])), {}),
    ("target outside, one position", (X[0], torch.tensor(7)), {}),
    ("target outside in an image", (torch.randn(1, 3, 2), torch.tensor([[1, 3]])), {}),
    ("target outside in a picture", (torch.randn(1, 3, 2, 2), torch.tensor([[[1, 3], [0, 0]]])), {}),
]
BAD_CALLS = [
    ("int32 target", (X, T.int()), {}),
    ("uint8 target", (X, T.byte()), {}),
    ("bool target", (X, T.bool()), {}),
    ("int16 target", (X, T.short()), {}),
    ("float target of indices' shape", (X, T.float()), {}),
    ("double probabilities for float logits", (X, torch.rand(4, 5).double()), {}),
    ("half probabilities for float logits", (X, torch.rand(4, 5).half()), {}),
    ("integer probabilities", (X, torch.ones(4, 5, dtype=torch.long)), {}),
    ("too few targets", (X, T[:3]), {}),
    ("too many targets", (X, torch.zeros(5, dtype=torch.long)), {}),
    ("a target for a batch of none", (X[0], T), {}),
    ("two-dimensional target", (X, T.view(2, 2)), {}),
    ("target of an image for rows", (torch.randn(2, 3, 4), torch.zeros(2, 5, dtype=torch.long)), {}),
    ("image and flat target", (torch.randn(2, 3, 4), torch.zeros(8, dtype=torch.long)), {}),
    ("probabilities of another shape", (X, torch.rand(4, 6)), {}),
    ("probabilities that would broadcast", (X, torch.rand(1, 5)), {}),
    ("probabilities and ignore_index", (X, torch.rand(4, 5)), {"ignore_index": 1}),
    ("weight too short", (X, T), {"weight": torch.rand(4)}),
    ("weight too long", (X, T), {"weight": torch.rand(6)}),
    ("weight of two dimensions", (X, T), {"weight": torch.rand(1, 5)}),
    ("weight of one number", (X, T), {"weight": torch.tensor(2.0)}),
    ("double weight", (X, T), {"weight": torch.rand(5).double()}),
    ("half weight", (X, T), {"weight": torch.rand(5).half()}),
    ("integer weight", (X, T), {"weight": torch.ones(5, dtype=torch.long)}),
    ("meta weight", (X, T), {"weight": torch.rand(5, device="meta")}),
    ("weight too short, probabilities", (X, torch.rand(4, 5)), {"weight": torch.rand(4)}),
    ("double weight, probabilities", (X, torch.rand(4, 5)), {"weight": torch.rand(5).double()}),
    ("smoothing above 1", (X, T), {"label_smoothing": 1.5}),
    ("smoothing below 0", (X, T), {"label_smoothing": -0.1}),
    ("smoothing NaN", (X, T), {"label_smoothing": NAN}),
    ("smoothing above 1, probabilities", (X, torch.rand(4, 5)), {"label_smoothing": 1.5}),
    ("unknown reduction", (X, T), {"reduction": "average"}),
    ("empty reduction", (X, T), {"reduction": ""}),
    ("integer logits", (torch.ones(4, 5, dtype=torch.long), T), {}),
    ("boolean logits", (X > 0, T), {}),
    ("complex logits", (X.to(torch.complex64), T), {}),
    ("sparse logits", (X.to_sparse(), T), {}),
    ("sparse target", (X, T.to_sparse()), {}),
    ("quantised logits", (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), T), {}),
    ("float8 logits", (X.to(torch.float8_e4m3fn), T), {}),
    ("number as logits", (torch.tensor(1.0), torch.tensor(0)), {}),
    ("meta logits", (X.to("meta"), T.to("meta")), {}),
    ("meta logits, probabilities", (X.to("meta"), X.to("meta")), {"reduction": "none", "ignore_index": -100}),
    ("meta logits and target of the CPU", (X.to("meta"), T), {}),
    ("meta target", (X, T.to("meta")), {}),
    ("legacy sum", (X, T), {"size_average": False}),
    ("legacy none", (X, T), {"reduce": False}),
    ("legacy mean", (X, T), {"size_average": True, "reduce": True}),
    ("a view with a pending negation", (torch._neg_view(X), T), {}),
    ("imaginary part", (torch.view_as_complex(torch.randn(4, 5, 2)).imag, T), {}),
    ("conjugate's imaginary part", (torch.view_as_complex(torch.randn(4, 5, 2)).conj().imag, T), {}),
    ("a parameter", (torch.nn.Parameter(X), T), {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("args", "options"), [row[1:] for row in BAD_TARGETS], ids=[row[0] for row in BAD_TARGETS])
def test_targets_out_of_range_raise_as_in_torch_and_make_nan_on_a_gpu(args, options):
    if devices.is_gpu():  # nothing waits for the device to say it
        assert cross_entropy(*args, **options).isnan().any()
    else:
        assert_same_outcome(args, options)


@pytest.mark.parametrize(("args", "options"), [row[1:] for row in BAD_CALLS], ids=[row[0] for row in BAD_CALLS])
def test_odd_calls_end_as_in_torch(args, options):
    assert_same_outcome(args, options)


@pytest.mark.parametrize("call", [(None, T), (X, None), (X.tolist(), T), (X, 3), (X.numpy(), T)])
def test_argument_that_is_no_tensor_is_refused(call):
    with pytest.raises(TypeError):
        F.cross_entropy(*call)
    with pytest.raises((TypeError, AttributeError)):
        cross_entropy(*call)


@pytest.mark.parametrize("bad", [-1, 100, 2**62, -(2**63)])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("n_classes", [5, 100])
def test_target_out_of_range_is_an_index_error_or_makes_its_row_nan(bad, requires_grad, n_classes):
    x = make_values((300, n_classes)).requires_grad_(requires_grad)
    target = torch.zeros(300, dtype=torch.long)
    target[-1] = bad
    if devices.is_gpu():
        loss = cross_entropy(x, target)
        assert loss.isnan()
        if requires_grad:
            loss.backward()
            assert x.grad[-1].isnan().all()
            assert x.grad[:-1].isfinite().all()
        return
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        cross_entropy(x, target)
    assert x.grad is None


def test_weights_of_indices_that_require_grad_are_refused_as_in_torch():
    assert_same_outcome((X, T), {"weight": torch.ones(5, requires_grad=True)})
    assert_same_outcome((X.clone().requires_grad_(), T), {"weight": torch.ones(5, requires_grad=True)})
