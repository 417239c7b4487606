"""``inplace_backward``: the same gradient, over the logits; misuse raises; what cannot be overwritten stays whole."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES, assert_no_worse, is_native, kernel_calls
from loss_cases import KINDS, LOGITS, loss_and_grad, make_values, slack_of, truth_of
from loss_helpers import CHANGED, Produce, options_table

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy
native = pytest.mark.native
WALKABLE = [case for case in LOGITS if case.layout in ("contiguous", "channels_last", "rows_apart")]
COPIED = [case for case in LOGITS if case.layout in ("permuted", "classes_apart")]


def in_place(values, target, grad_output=None, **options):
    """Loss, gradient and the memory that it came in; `values` are overwritten."""
    leaf = values.detach().requires_grad_()
    loss = cross_entropy(Produce.apply(leaf), target, inplace_backward=True, **options)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
    return loss.detach(), leaf.grad, Produce.grad


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@options_table
@pytest.mark.parametrize("logits", WALKABLE, ids=str)
def test_gradient_is_as_exact_and_overwrites_the_logits(logits, options, dtype):
    x = make_values(logits.sizes, dtype)
    target, arguments = options.make(logits, dtype)
    values = logits.lay(x.clone())
    calls = kernel_calls("cross_entropy")
    loss, grad, handed_on = in_place(values, target, **arguments)
    assert kernel_calls("cross_entropy") == calls + 2
    assert handed_on.data_ptr() == values.data_ptr()
    assert handed_on.dtype == dtype
    assert torch.equal(values, grad)
    others = loss_and_grad(F.cross_entropy, logits.lay(x), target, **arguments)
    truth = truth_of(F.cross_entropy, logits.lay(x), target, **arguments)
    # Size of a gradient's terms before they cancel: with one class they leave 0.
    unit = 1 / max(math.prod(logits.positions), 1) if options.reduction == "mean" else 1.0
    for scale, *results in zip((0.0, unit), (loss, grad), others, truth, strict=True):
        own, other, exact = (torch.cat([v.flatten(), v.new_tensor([scale])]) for v in results)
        assert_no_worse(own, other, exact, slack=slack_of(logits, dtype))


@native
@pytest.mark.parametrize("factor", [0.5, [2.0, -1.0, 0.0]])
def test_gradient_of_the_loss_multiplies_the_result(factor):
    x, target = make_values((3, 100)), torch.tensor([5, -100, 99])
    factor = torch.tensor(factor)
    arguments = dict(reduction="none" if factor.dim() else "mean")
    _, grad, _ = in_place(x.clone(), target, factor, **arguments)
    torch.testing.assert_close(grad, loss_and_grad(F.cross_entropy, x, target, factor, **arguments)[1])


@native
def test_logits_are_unchanged_until_the_backward_which_bumps_their_version():
    weight = make_values((6, 10)).requires_grad_()
    x = weight * 1
    before, version = x.detach().clone(), x._version
    loss = cross_entropy(x, torch.arange(6), inplace_backward=True)
    assert torch.equal(x, before)
    assert x._version == version
    loss.backward()
    assert not torch.equal(x, before)
    assert x._version == version + 1


@pytest.mark.parametrize("logits", COPIED, ids=str)
def test_logits_in_a_layout_without_a_kernel_are_not_overwritten(logits):
    x = make_values(logits.sizes)
    target, arguments = KINDS[1].make(logits, torch.float32)
    values = logits.lay(x.clone())
    _, grad, handed_on = in_place(values, target, **arguments)
    torch.testing.assert_close(grad, loss_and_grad(F.cross_entropy, x, target, **arguments)[1])
    if not is_native():
        assert torch.equal(values, x)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast_keeps_the_option(dtype, cache):
    """The gradient goes over what the kernel reads: on CUDA, of 16-bit logits, their float32 copy."""

    def train(function, **options):
        torch.manual_seed(0)
        layer = torch.nn.Linear(10, 10)
        x = make_values((6, 10)).requires_grad_()
        with torch.autocast(devices.CUDA if x.is_cuda else devices.CPU, torch.bfloat16, cache_enabled=cache):
            y = layer(x).to(dtype)
            loss = function(y, torch.arange(6), **options)
        before = y.detach().clone()
        loss.backward()
        return loss.detach(), x.grad, layer.weight.grad, y.detach(), before

    loss, *grads, logits, before = train(cross_entropy, inplace_backward=True)
    calls = kernel_calls("cross_entropy")
    theirs = train(F.cross_entropy)
    assert kernel_calls("cross_entropy") == calls
    # On CUDA torch takes the logarithms of the softmax in the logits' dtype, also under autocast.
    unit = torch.finfo(dtype).eps if devices.current() == devices.CUDA else 0
    torch.testing.assert_close([loss, *grads], list(theirs[:3]), rtol=max(1.3e-6, unit), atol=max(1e-5, unit / 8))
    is_copied = dtype != torch.float32 and devices.is_gpu()
    assert torch.equal(logits, before) == is_copied


def leaf():
    x = make_values((6, 10)).requires_grad_()
    return x, x


def view_of_leaf():
    x = make_values((6, 10)).requires_grad_()
    return x, x.view(6, 10)


def expanded():
    x = make_values((1, 10)).requires_grad_()
    return x, (x * 1).expand(6, 10)


def one_of_several_views():
    x = make_values((6, 20)).requires_grad_()
    return x, (x * 1).chunk(2, dim=1)[0]


@native
@pytest.mark.parametrize("make", [leaf, view_of_leaf, expanded, one_of_several_views], ids=lambda f: f.__name__)
def test_logits_that_may_not_be_overwritten_raise_what_torch_raises(make):
    with pytest.raises(RuntimeError) as theirs:
        make()[1].mul_(2)
    _, x = make()
    before = x.detach().clone()
    with pytest.raises(RuntimeError) as ours:
        cross_entropy(x, torch.arange(6), inplace_backward=True)
    assert str(ours.value).split(". ")[0] == str(theirs.value).split(". ")[0]
    assert torch.equal(x, before)


@pytest.mark.parametrize("make", [leaf, view_of_leaf], ids=lambda f: f.__name__)
def test_the_reference_path_refuses_leaves_too(make):
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad|a view of a leaf Variable"):
        cross_entropy(make()[1], torch.arange(6), inplace_backward=True)
    with torch.no_grad():
        cross_entropy(make()[1], torch.arange(6), inplace_backward=True)


@native
@pytest.mark.parametrize(
    "misuse",
    [
        lambda x, y, loss: (y.sum() + loss).backward(),  # its producer saved its output
        lambda x, y, loss: (loss.backward(retain_graph=True), loss.backward()),
        lambda x, y, loss: (loss + y.pow(2).sum()).backward(),
        lambda x, y, loss: (y.detach().add_(1), loss.backward()),
    ],
    ids=["saved by the producer", "two backwards", "saved by another consumer", "changed before"],
)
def test_other_backwards_that_saved_the_logits_raise(misuse):
    x = make_values((6, 10)).requires_grad_()
    y = x.tanh()
    loss = cross_entropy(y, torch.arange(6), inplace_backward=True)
    with pytest.raises(RuntimeError, match=CHANGED):
        misuse(x, y, loss)


@native
def test_other_consumers_that_need_no_values_get_the_sum():
    def grad(function, **options):
        x = make_values((6, 10)).requires_grad_()
        y = x * 2
        (function(y, torch.arange(6), **options) + y.sum()).backward()
        return x.grad

    torch.testing.assert_close(grad(cross_entropy, inplace_backward=True), grad(F.cross_entropy))


def test_derivatives_of_derivatives_are_not_in_place():
    def second(function, **options):
        x = make_values((6, 10), torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(function(x * 1, torch.arange(6), **options), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    torch.testing.assert_close(second(cross_entropy, inplace_backward=True), second(F.cross_entropy))


def test_without_a_gradient_nothing_is_overwritten():
    x = make_values((6, 10))
    before = x.clone()
    loss = cross_entropy(x, torch.arange(6), inplace_backward=True)
    with torch.no_grad():
        cross_entropy(x.clone().requires_grad_(), torch.arange(6), inplace_backward=True)
    assert torch.equal(x, before)
    torch.testing.assert_close(loss, F.cross_entropy(before, torch.arange(6)))


def test_the_module_has_the_keyword():
    module = fastopt.CrossEntropyLoss(inplace_backward=True, label_smoothing=0.1)
    x = make_values((6, 10)).requires_grad_()
    for loss_module in (module, copy.deepcopy(module), torch.jit.script(module)):
        x.grad = None
        loss_module(x * 1, torch.arange(6)).backward()
        expected = loss_and_grad(F.cross_entropy, x, torch.arange(6), label_smoothing=0.1)[1]
        torch.testing.assert_close(x.grad, expected)
    with pytest.raises(RuntimeError, match="leaf"):
        module(x, torch.arange(6))
