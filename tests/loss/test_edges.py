"""Cross-entropy at the edges: infinities, empty tensors, every size and offset, and calls that must be refused."""

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES, assert_no_worse
from loss_cases import KINDS, Logits, loss_and_grad, make_values, truth_of

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

cross_entropy = fastopt.functional.cross_entropy
INF, NAN = float("inf"), float("nan")
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


def assert_same(input, target, **options):
    """Value and gradient are those of torch, infinities and NaN included."""
    ours = loss_and_grad(cross_entropy, input, target, **options)
    theirs = loss_and_grad(F.cross_entropy, input, target, **options)
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        tolerance = 8 * torch.finfo(own.dtype).eps
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_as_exact(own, reference, truth):
    """As assert_no_worse; numbers much smaller than 1, and torch's overflow in 16 bits, do not count."""
    expected = truth.to(own.dtype).double()  # what overflows the dtype is infinite
    reference = torch.where(reference.isfinite(), reference, expected.to(own.dtype))
    values = (torch.cat([v.flatten(), v.new_ones(1)]) for v in (own, reference, expected))
    assert_no_worse(*values, slack=32 if own.dtype == torch.float64 else 4)


# --- Infinities, NaN, and numbers far apart ---------------------------------------------------------------------------

ROWS = [
    ([-INF, 0.0, 1.0], "a masked class"),
    ([-INF, -INF, 1.0], "all but one masked"),
    ([-INF, -INF, -INF], "all masked: NaN"),
    ([INF, 0.0, 1.0], "infinity minus infinity: NaN"),
    ([INF, INF, -INF], "several infinities"),
    ([NAN, 0.0, 1.0], "NaN must not be lost in the maximum"),
    ([NAN, INF, -INF], "everything at once"),
    ([NAN, NAN, NAN], "nothing but NaN"),
    ([-1e4, -1e4, -1.0001e4], "a maximum that starts at 0 would underflow"),
    ([-6e4, -6.1e4, -6.5e4], "the same near the end of float16"),
    ([6e4, -6e4, 0.0], "a difference that float16 cannot hold"),
    ([0.0, -87.0, -88.0], "exponentials at the smallest normal float"),
    ([0.0, -104.0, -746.0], "exponentials that are 0 in float and in double"),
    ([0.0, -0.0, 0.0], "signed zeros"),
]


def rows_of(n_classes, dtype):
    """Each of the rows, its numbers placed at both ends and in the middle of n_classes classes."""
    x = torch.zeros(len(ROWS), n_classes, dtype=torch.float64)
    for i, (numbers, _) in enumerate(ROWS):
        x[i] = numbers[1]
        x[i, 0], x[i, n_classes // 2], x[i, -1] = numbers
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [3, 65, 4100])  # narrow, wide, several blocks
@pytest.mark.parametrize("as_columns", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_and_nan_give_what_torch_gives(dtype, n_classes, as_columns, smoothing):
    rows = rows_of(n_classes, dtype)
    x = rows.t().contiguous().t() if as_columns else rows
    for target_class in (0, n_classes // 2, n_classes - 1):
        target = torch.full((len(ROWS),), target_class)
        options = {"label_smoothing": smoothing, "reduction": "none"}
        ours = loss_and_grad(cross_entropy, x, target, **options)
        theirs = loss_and_grad(F.cross_entropy, x, target, **options)
        truths = truth_of(F.cross_entropy, x, target, **options)
        for own, other, truth in zip(ours, theirs, truths, strict=True):
            for i, (numbers, why) in enumerate(ROWS):
                try:
                    assert_as_exact(own[i], other[i], truth[i])
                except AssertionError as error:
                    raise AssertionError(f"{numbers} ({why}), target {target_class}: {error}") from None


@pytest.mark.parametrize("n_classes", [3, 100, 4100])
@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.float32, -1e38), (torch.float32, -3.4e38), (torch.float64, -1e308), (torch.float64, -1e38)],
)
def test_logits_near_the_lowest_finite_number_contribute(n_classes, dtype, low):
    x = torch.full((4, n_classes), low, dtype=dtype)
    x[1, -1] = 0.0
    x[2, 0] = -low
    x[3, :] = torch.finfo(dtype).min
    assert_same(x, torch.tensor([0, n_classes - 1, 0, 1]), reduction="none")


def test_masked_classes_with_no_probability_give_what_torch_gives():
    x = make_values((4, 100))
    x[:, 7] = -INF
    y = torch.softmax(x, 1)  # 0 at the masked class: 0 times infinity is NaN in torch too
    assert_same(x, y, reduction="none")
    assert_same(x[:, :10], y[:, :10], reduction="none")


# --- Empty and tiny ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0,), (0, 5), (5, 0), (0, 0), (0, 5, 3), (2, 5, 0), (2, 0, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_empty_logits_give_what_torch_gives(sizes, reduction, kind):
    positions = sizes[:1] + sizes[2:] if len(sizes) > 1 else ()
    target = torch.zeros(positions, dtype=torch.long) if kind == "index" else torch.zeros(sizes)
    assert_same_outcome((torch.zeros(sizes), target), {"reduction": reduction})


@pytest.mark.parametrize("n_classes", [10, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_over_no_targets_is_nan_with_zero_gradient(n_classes, smoothing):
    x, target = make_values((4, n_classes)), torch.full((4,), -100)
    loss, grad = loss_and_grad(cross_entropy, x, target, label_smoothing=smoothing)
    assert loss.isnan()
    theirs = loss_and_grad(F.cross_entropy, x, target, label_smoothing=smoothing)[1]
    torch.testing.assert_close(grad, theirs, equal_nan=True)


@pytest.mark.parametrize("n_classes", [10, 100])
@pytest.mark.parametrize("weight", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("is_used", [False, True])
def test_non_finite_weight_affects_the_same_results_as_in_torch(n_classes, weight, reduction, is_used):
    weights = torch.linspace(0.5, 1.5, n_classes)
    weights[3] = weight
    target = torch.tensor([0, 1, 3 if is_used else 2, n_classes - 1])
    assert_same(make_values((4, n_classes)), target, weight=weights, reduction=reduction)


@pytest.mark.parametrize("n_classes", [10, 100])
def test_weights_of_zero_give_what_torch_gives(n_classes):
    weight = torch.zeros(n_classes)
    weight[3] = 1.0
    for targets in ([3, 3], [3, 4], [4, 4]):  # the last: 0 / 0
        for smoothing in (0.0, 0.1):
            x = make_values((2, n_classes))
            assert_same(x, torch.tensor(targets), weight=weight, label_smoothing=smoothing)


# --- Every size and offset --------------------------------------------------------------------------------------------

# Vectors and their tails; the border to wide rows; a flush of sums; a block; two blocks and one.
CLASS_COUNTS = [*range(1, 34), *range(63, 68), *range(255, 259), *range(2047, 2051), 4097]


def check_inside_nan(sizes, options, dtype, offset=1):
    """Logits and probabilities between NaN, at an odd address: what lies outside must not leak in, nor change."""
    logits = Logits(sizes, "contiguous", "")
    values = make_values(sizes, dtype)
    target, arguments = options.make(logits, dtype)
    n = values.numel()
    buffers = []

    def inside(values):
        buffers.append(values.new_full((n + offset + 40,), NAN))
        buffers[-1][offset : offset + n] = values.flatten()
        return buffers[-1][offset : offset + n].view(sizes)

    x = inside(values)
    y = inside(target) if options.kind == "probability" else target
    copies = [buffer.clone() for buffer in buffers]
    ours = loss_and_grad(cross_entropy, x, y, **arguments)
    theirs = loss_and_grad(F.cross_entropy, values, target, **arguments)
    for own, other, truth in zip(ours, theirs, truth_of(F.cross_entropy, values, target, **arguments), strict=True):
        assert_as_exact(own, other, truth)
    for buffer, copy in zip(buffers, copies, strict=True):
        torch.testing.assert_close(buffer, copy, rtol=0, atol=0, equal_nan=True)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_classes_is_as_exact_as_torch(options, dtype):
    for n_classes in CLASS_COUNTS:
        check_inside_nan((3, n_classes), options, dtype)
        check_inside_nan((2, n_classes, 3), options, dtype)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_positions_is_as_exact_as_torch(options, dtype):
    for n in [*range(1, 34), 255, 256, 257]:  # lanes of a tile; a whole tile and its neighbours
        check_inside_nan((n, 3), options, dtype)
        check_inside_nan((1, 3, n), options, dtype)
    for n in range(1, 34):
        check_inside_nan((n, 70), options, dtype)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_may_start_at_any_element(offset, dtype):
    for options in KINDS:
        for sizes in [(5, 10), (3, 100), (2, 5, 20)]:
            check_inside_nan(sizes, options, dtype, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_operator_allocates_no_more_than_the_gradient(dtype):
    x, target = make_values((5, 100), dtype), torch.arange(5)
    _, grad = torch.ops.fastopt.cross_entropy_forward(x, target, None, 1, -100, 0.0, True)
    assert grad.shape == x.shape
    assert grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()


# --- Calls that must be refused ---------------------------------------------------------------------------------------


def outcome(function, args, options):
    """The value of a call, or the type and message of its exception."""
    try:
        return function(*args, **options)
    except Exception as error:
        return type(error), str(error)


def assert_same_outcome(args, options):
    theirs = outcome(F.cross_entropy, args, options)
    ours = outcome(cross_entropy, args, options)
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), f"torch accepts this, we raise {ours}"
        assert (ours.dtype, ours.device, ours.layout) == (theirs.dtype, theirs.device, theirs.layout)
        if theirs.device.type == "meta":
            assert ours.shape == theirs.shape
        else:
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    else:
        assert ours == theirs


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


def test_weights_and_probabilities_get_torchs_gradients():
    def grads(function, leaves, **options):
        x, target = make_values((4, 5), torch.float64), make_values((4, 5), torch.float64, seed=2).softmax(1)
        tensors = {"x": x, "target": target, "weight": torch.linspace(1, 2, 5, dtype=torch.float64)}
        for name in leaves:
            tensors[name].requires_grad_()
        loss = function(tensors["x"], tensors["target"], tensors["weight"], **options)
        return torch.autograd.grad(loss, [tensors[name] for name in leaves])

    for leaves in (["target"], ["weight"], ["x", "weight"], ["x", "target"], ["x", "target", "weight"]):
        for smoothing in (0.0, 0.1):
            ours = grads(cross_entropy, leaves, label_smoothing=smoothing)
            theirs = grads(F.cross_entropy, leaves, label_smoothing=smoothing)
            torch.testing.assert_close(ours, theirs)


def test_weights_of_indices_that_require_grad_are_refused_as_in_torch():
    assert_same_outcome((X, T), {"weight": torch.ones(5, requires_grad=True)})
    assert_same_outcome((X.clone().requires_grad_(), T), {"weight": torch.ones(5, requires_grad=True)})
