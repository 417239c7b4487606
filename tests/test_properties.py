"""Laws that hold for any shape, layout, dtype and option: no further from float64 than torch is."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from common import DTYPES, HALVES, assert_no_worse, error
from drawn_examples import drawn
from loss_cases import loss_and_grad, make_values, truth_of
from loss_helpers import assert_as_exact
from optimizers import OPTIMIZERS

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)


@st.composite
def layouts(draw, values):
    """The values in another layout: dimensions in any order in memory, gaps with NaN between, dimensions expanded."""
    n_dims = values.dim()
    order = draw(st.permutations(range(n_dims)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(n_dims)]
    starts = [draw(st.integers(0, step - 1)) for step in steps]
    sizes = [values.shape[d] * steps[d] for d in order]
    has_margin = draw(st.booleans())
    buffer = torch.full([has_margin + size for size in sizes], float("nan"), dtype=values.dtype)
    view = buffer.permute([order.index(d) for d in range(n_dims)])
    view = view[tuple(slice(starts[d], values.shape[d] * steps[d], steps[d]) for d in range(n_dims))]
    view.copy_(values)
    return view


@st.composite
def losses(draw):
    n_classes = draw(st.sampled_from([1, 2, 3, 7, 10, 16, 17, 63, 64, 65, 100, 257]))
    n_dims = draw(st.sampled_from([1, 2, 2, 2, 3, 4, 5]))
    positions = [draw(st.integers(1, 9 if n_dims < 4 else 3)) for _ in range(n_dims - 1)]
    if n_dims == 2 and n_classes < 20:
        positions = [draw(st.sampled_from([1, 2, 31, 33, 255, 257]))]
    sizes = (n_classes,) if n_dims == 1 else (positions[0], n_classes, *positions[1:])
    dtype, seed = draw(dtypes), draw(seeds)
    scale = draw(st.sampled_from([0.0, 1.0, 5.0, 50.0]))
    input = draw(layouts(make_values(sizes, dtype, seed, scale)))
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }
    if draw(st.booleans()):
        weight = torch.randint(1, 9, (n_classes,), generator=torch.Generator().manual_seed(seed)) / 4
        options["weight"] = draw(layouts(weight.to(dtype)))
    shape = sizes[:1] + sizes[2:] if n_dims > 1 else ()
    if draw(st.booleans()):
        target = torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed + 1))
        options["ignore_index"] = draw(st.sampled_from([-100, 0, n_classes - 1, -1, n_classes, 2**40]))
        if draw(st.booleans()):
            target = torch.where(torch.arange(target.numel()).view(shape) % 3 == 1, options["ignore_index"], target)
        if target.dim() > 1 and draw(st.booleans()):
            target = target.mT.contiguous().mT
    else:
        probabilities = make_values(sizes, torch.float64, seed + 1).softmax(1 if n_dims > 1 else 0)
        target = draw(layouts(probabilities.to(dtype)))
    return input, target, options


@drawn
@given(losses())
def test_any_loss_and_its_gradient_are_as_exact_as_torchs(case):
    input, target, options = case
    before = [t.clone() for t in (input, target)]
    ours = loss_and_grad(fastopt.functional.cross_entropy, input, target, **options)
    theirs = loss_and_grad(F.cross_entropy, input, target, **options)
    for own, other, truth in zip(ours, theirs, truth_of(F.cross_entropy, input, target, **options), strict=True):
        assert (own.dtype, own.shape) == (other.dtype, other.shape)
        assert_as_exact(own, other, truth)
    for tensor, copy in zip((input, target), before, strict=True):
        assert torch.equal(tensor, copy)


@drawn
@given(losses(), st.sampled_from([0.0, 1.0, -7.5]))
def test_the_gradient_of_any_loss_sums_to_zero_and_scales(case, factor):
    """A shift of all logits of a position changes nothing; a gradient is linear in that of the loss."""
    input, target, options = case
    if not target.is_floating_point() and (target == options["ignore_index"]).all():
        return  # torch's mean over nothing is NaN
    function = fastopt.functional.cross_entropy
    loss, grad = loss_and_grad(function, input, target, **options)
    class_dim = 1 if input.dim() > 1 else 0
    eps = torch.finfo(input.dtype).eps
    largest = max(1.0, grad.abs().max().item()) * grad.shape[class_dim]
    assert grad.double().sum(class_dim).abs().max() <= 4 * eps * largest
    _, scaled = loss_and_grad(function, input, target, torch.full_like(loss, factor), **options)
    assert error(scaled, grad.double() * factor) <= 4 * eps * abs(factor) * largest


@st.composite
def optimizers(draw):
    row = draw(st.sampled_from(OPTIMIZERS))
    decay = {"weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])), "maximize": draw(st.booleans())}
    own = {option: st.sampled_from(values) for option, values in row.drawn.items()}
    own = draw(st.fixed_dictionaries(own).filter(row.is_allowed))
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        tensors = []
        for _ in range(draw(st.integers(0, 3))):
            sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 17]), max_size=3))
            dtype = draw(dtypes)
            tensors.append((sizes, dtype, draw(seeds), draw(st.integers(0, 2**30)), draw(st.booleans())))
        groups.append((tensors, draw(st.sampled_from([0.0, 1e-3, 0.125]))))
    return row, {**decay, **own}, groups, draw(st.booleans())


def laid_out(values, seed):
    """The values in a layout drawn by a seed, the same for each run: contiguous, permuted, or with gaps."""
    kind = seed % 4
    if kind == 1 and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2 and values.dim() > 0:
        return torch.stack([values, values], -1).flatten(-2)[..., ::2]
    return values.clone()


def trajectory(cls, options, groups, dtype=None):
    params, param_groups = [], []
    for tensors, lr in groups:
        own = [
            torch.nn.Parameter(
                laid_out(make_values(sizes, torch.float64, seed).to(own_dtype).to(dtype or own_dtype), layout)
            )
            for sizes, own_dtype, seed, layout, _ in tensors
        ]
        params += own
        param_groups.append({"params": own, "lr": lr})
    optimizer = cls(param_groups, **options)
    described = [tensor for tensors, _ in groups for tensor in tensors]
    for step in range(4):
        for p, (sizes, own_dtype, seed, layout, is_late) in zip(params, described, strict=True):
            values = (
                make_values(sizes, torch.float64, seed + 77 * step + 1, scale=1.0).to(own_dtype).to(dtype or own_dtype)
            )
            p.grad = None if is_late and step < 2 else laid_out(values, layout // 4)
        optimizer.step()
    return params


@drawn
@given(optimizers())
def test_any_optimizer_is_as_exact_as_torchs(case):
    row, options, groups, is_fused = case
    extra = {"fused": True} if is_fused and row.has("fused") else {}
    ours = trajectory(row.ours, {**options, **extra}, groups)
    theirs = trajectory(row.theirs, options, groups)
    truth = trajectory(row.theirs, options, groups, torch.float64)
    for own, other, exact in zip(ours, theirs, truth, strict=True):
        assert own.stride() == other.stride()
        slack = {torch.float64: 200}.get(own.dtype, 20 if own.dtype in HALVES else 8)
        one = own.new_ones(1)
        assert_no_worse(
            *(torch.cat([v.detach().flatten().double(), one.double()]).to(v.dtype) for v in (own, other, exact)), slack
        )
