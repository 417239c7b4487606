"""torch's own tables of samples for the cross-entropy, as a function and as a module, with fastopt's in its place."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal import composite_compliance, optests
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastopt
from common import DTYPES, assert_no_worse, attempt

cross_entropy = fastopt.functional.cross_entropy
(OP,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
(MODULE,) = (info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)


@functools.cache
def samples(dtype, requires_grad=False):
    """The samples of torch's table, which are those of its reference inputs too, and the same each time."""
    torch.manual_seed(0)
    found = list(OP.reference_inputs("cpu", dtype, requires_grad=requires_grad))
    return [(sample.input, *sample.args, sample.kwargs) for sample in found]


@functools.cache
def module_inputs(dtype):
    torch.manual_seed(0)
    return MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=False, training=True)


def widened(value):
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


N_SAMPLES = len(samples(torch.float64))
N_MODULE_INPUTS = len(module_inputs(torch.float64))
all_samples = pytest.mark.parametrize("index", range(N_SAMPLES))
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def loss_and_gradients(function, input, target, options):
    """The loss, and the gradients of a sum of it with respect to all that wants one."""
    leaves = [t.detach().requires_grad_() for t in (input, target) if t.is_floating_point() and t.requires_grad]
    arguments = iter(leaves)
    input, target = (next(arguments) if t.is_floating_point() and t.requires_grad else t for t in (input, target))
    loss = function(input, target, **options)
    weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, weights, allow_unused=True)]


def test_torchs_table_covers_all_dtypes_of_the_kernels():
    assert set(OP.dtypes) == set(DTYPES)
    assert N_SAMPLES >= 20
    assert N_MODULE_INPUTS >= 90


@all_dtypes
@all_samples
def test_loss_and_gradients_are_no_further_from_float64_than_torchs(index, dtype):
    input, target, options = samples(dtype, requires_grad=True)[index]
    ours, theirs = (loss_and_gradients(f, input, target, options) for f in (cross_entropy, F.cross_entropy))
    wide = [widened(input).requires_grad_(), widened(target)]
    wide[1] = wide[1].requires_grad_(target.requires_grad)
    truths = loss_and_gradients(F.cross_entropy, *wide, {name: widened(value) for name, value in options.items()})
    for found, expected, truth in zip(ours, theirs, truths, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert_no_worse(found, expected, truth, slack=4)


# --- Laws of every operator -------------------------------------------------------------------------------------------


def gradients_of_first_and_second_order(f, input, target, options):
    arguments = (input, target) if target.requires_grad else (input,)

    def loss(input, target=target):
        return f(input, target, **options)

    checks = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(loss, arguments, **checks)
    assert torch.autograd.gradgradcheck(loss, arguments, check_batched_grad=True, check_fwd_over_rev=True)


def forward_over_forward_is_left_to_torch(f, input, target, options):
    def tangent(function):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(input.detach(), torch.ones_like(input) * input.detach())
            return forward_ad.unpack_dual(function(dual, target.detach(), **options)).tangent

    torch.testing.assert_close(tangent(f), tangent(F.cross_entropy))


def a_layout_changes_nothing(f, input, target, options):
    def strided(t):
        return torch.stack([t.detach(), torch.full_like(t, 7)], -1)[..., 0].requires_grad_(t.requires_grad)

    expected = loss_and_gradients(f, input, target, options)
    for found, value in zip(loss_and_gradients(f, strided(input), strided(target), options), expected, strict=True):
        torch.testing.assert_close(found, value)


def a_graph_of_its_calls_computes_the_same(f, input, target, options):
    weight = options.get("weight")
    others = {name: value for name, value in options.items() if name != "weight"}
    target = target.detach()

    def gradient(input, target, weight):
        input = input.detach().requires_grad_()
        loss = f(input, target, **({} if weight is None else {"weight": weight}), **others)
        return loss, *torch.autograd.grad(loss.sum(), input)

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(gradient, tracing_mode=mode)(input.detach(), target, weight)
        other = input.detach() * 2 - 1
        torch.testing.assert_close(graph(other, target, weight), gradient(other, target, weight))


def fake_tensors_give_shape_dtype_and_strides(f, input, target, options):
    expected = f(input, target, **options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for convert in (mode.from_tensor, lambda t: t):
            fake = {k: convert(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            found = f(convert(input), convert(target), **fake)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert found.stride() == expected.stride()
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert f(input.to("meta"), target.to("meta"), **meta).shape == expected.shape


def it_is_compiled_ahead_of_time(f, input, target, options):
    for dynamic in (False, True):
        optests.aot_autograd_check(f, (input, target), options, dynamic=dynamic, check_gradients="auto")


def it_composes_with_tensor_subclasses_and_modes(f, input, target, options):
    same = torch.testing.assert_close
    composite_compliance.check_with_mode(f, (input, target), options, same)
    composite_compliance.check_all_permutations(f, (input, target), options, same)
    composite_compliance.check_backward_formula(f, (input, target), options, assert_equal_fn=same)
    composite_compliance.check_forward_ad_formula(f, (input, target), options, assert_equal_fn=same)


def it_is_mapped_over_a_batch(f, input, target, options):
    inputs, targets = torch.stack([input, 2 * input]).detach(), torch.stack([target, target]).detach()
    for dims, arguments in (
        ((0, 0), (inputs, targets)),
        ((0, None), (inputs, targets[0])),
        ((None, 0), (inputs[0], targets)),
        ((-1, 0), (inputs.movedim(0, -1), targets)),
    ):
        found = torch.vmap(lambda x, t: f(x, t, **options), dims)(*arguments)
        expected = torch.vmap(lambda x, t: F.cross_entropy(x, t, **options), dims)(*arguments)
        torch.testing.assert_close(found, expected)


def inputs_are_only_read(f, input, target, options):
    tensors = [t for t in (input, target, options.get("weight")) if t is not None]
    copies, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    torch.autograd.grad(f(input, target, **options).sum(), input)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
    assert [t._version for t in tensors] == versions


def lazy_copies_are_not_made(f, input, target, options):
    lazy = torch._lazy_clone(input.detach()), torch._lazy_clone(target.detach())
    torch.testing.assert_close(f(*lazy, **options), f(input, target, **options))
    assert all(torch._C._is_cow_tensor(t) for t in lazy)


LAWS = [
    gradients_of_first_and_second_order,
    forward_over_forward_is_left_to_torch,
    a_layout_changes_nothing,
    a_graph_of_its_calls_computes_the_same,
    fake_tensors_give_shape_dtype_and_strides,
    it_is_compiled_ahead_of_time,
    it_composes_with_tensor_subclasses_and_modes,
    it_is_mapped_over_a_batch,
    inputs_are_only_read,
    lazy_copies_are_not_made,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@all_samples
def test_laws_of_cross_entropy_hold(law, index):
    input, target, options = samples(torch.float64, requires_grad=True)[index]
    law(cross_entropy, input, target, options)


# --- The module -------------------------------------------------------------------------------------------------------


def copies_of(module):
    """The module by all the ways in which one can be had from another."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, torch.jit.script(module)]


@all_dtypes
def test_the_module_gives_what_torchs_module_gives(dtype):
    copies = {}  # by the options of the module; compiling a script takes its time
    for case in module_inputs(dtype):
        made, (input, target) = case.constructor_input, case.forward_input.args
        ours, theirs = (
            cls(*made.args, **made.kwargs).to(dtype) for cls in (fastopt.CrossEntropyLoss, torch.nn.CrossEntropyLoss)
        )
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        truth = copy.deepcopy(theirs).double()(widened(input), widened(target))
        if repr(made) not in copies:
            copies[repr(made)] = copies_of(ours)
        for module in copies[repr(made)]:
            assert_no_worse(module(input, target), theirs(input, target), truth, slack=8)
        if dtype == torch.float64:
            expected = case.reference_fn(ours, input, target)
            torch.testing.assert_close(ours(input, target), expected, equal_nan=True)
        assert ours.to("meta")(input.to("meta"), target.to("meta")).shape == truth.shape


@all_dtypes
def test_wrong_input_of_the_module_raises_as_the_table_says(dtype):
    errors = MODULE.module_error_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=False, training=True)
    assert errors
    for case in errors:
        made, given = case.module_error_input.constructor_input, case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            fastopt.CrossEntropyLoss(*made.args, **made.kwargs)(*given.args, **given.kwargs)


@all_dtypes
def test_samples_with_one_argument_spoiled_raise_what_torch_raises(dtype):
    """Each argument in turn of another shape, dtype or kind: torch's result, or torch's error."""
    for input, target, options in samples(dtype):
        spoiled = [
            (input[:1], target, options),
            (input.mT, target, options),
            (input[..., None], target, options),
            (input.long(), target, options),
            (input.to(torch.complex64), target, options),
            (input, target[:1], options),
            (input, target[..., None], options),
            (input, target.int(), options),
            (input, target.bool(), options),
            (input, target.to(torch.uint8), options),
            (input, target.double(), options),
            (input, target.float(), options),
            (input, input.requires_grad_(False), {**options, "ignore_index": 1}),
            (input, target, {**options, "weight": torch.ones(2, dtype=dtype)}),
            (input, target, {**options, "weight": torch.ones(3, 1, dtype=dtype)}),
            (input, target, {**options, "weight": torch.ones(3, dtype=torch.float64)}),
            (input, target, {**options, "weight": torch.ones(3, dtype=torch.long)}),
            (input, target, {**options, "weight": torch.ones(3, dtype=dtype).requires_grad_()}),
            (input, target, {**options, "reduction": "max"}),
            (input, target, {**options, "reduction": None}),
            (input, target, {**options, "label_smoothing": 1.5}),
            (input, target, {**options, "label_smoothing": "x"}),
            (input, target, {**options, "ignore_index": 0.5}),
            (input, None, options),
            (None, target, options),
        ]
        for arguments in spoiled:
            found, expected = (
                attempt(lambda f=f, a=arguments: f(a[0], a[1], **a[2])) for f in (cross_entropy, F.cross_entropy)
            )
            if isinstance(expected, torch.Tensor):
                tolerance = 0.05 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-5
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
                continue
            n = 1 if expected[0] == "TypeError" else 2  # of what no signature takes, each parser has its own message
            assert found[:n] == expected[:n], arguments
