"""Pointwise losses in compiled, traced, mapped and converted programs; torch's own databases of them."""

import copy

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from common import DTYPES, assert_no_worse, kernel_calls
from pointwise_losses import LOSSES

all_losses = pytest.mark.parametrize("loss", LOSSES, ids=str)
all_reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def gradients(function, tensors, reduction="mean"):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves, reduction=reduction).sum(), leaves)


@all_losses
@all_reductions
def test_a_compiled_loss_is_one_graph_of_torchs_operators(loss, reduction):
    torch._dynamo.reset()
    tensors = loss.make((3, 4), torch.float32)
    compiled = torch.compile(lambda *t, **options: loss.ours(*t, **options), backend="aot_eager", fullgraph=True)
    before = kernel_calls(loss.name)
    torch.testing.assert_close(gradients(compiled, tensors, reduction), gradients(loss.torchs, tensors, reduction))
    assert kernel_calls(loss.name) == before


@all_losses
@all_reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_autograd_differentiates_the_node(loss, reduction, dtype):
    tensors = loss.make((3, 4), dtype)

    def backward(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        value = function(*leaves, reduction=reduction).sum() * 2
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            value.backward()
        return [leaf.grad for leaf in leaves]

    found = backward(loss.ours)
    torch.testing.assert_close(found, backward(loss.torchs), rtol=0.02, atol=1e-3)


@all_losses
def test_saved_programs_consist_of_torchs_operators(loss):
    tensors = loss.make((3, 4), torch.float32)
    traced = torch.jit.trace(loss.ours, tuple(tensors))
    assert "fastopt" not in str(traced.graph)
    torch.testing.assert_close(traced(*tensors), loss.torchs(*tensors))
    exported = torch.export.export(getattr(fastopt, loss.module_name)(), tuple(tensors))
    assert "fastopt" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(*tensors), loss.torchs(*tensors))
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda *t: gradients(loss.ours, t), tracing_mode=mode)(*tensors)
        torch.testing.assert_close(graph(*tensors), gradients(loss.torchs, tensors))


@all_losses
@all_reductions
def test_functorch(loss, reduction):
    def results(function):
        def scalar(*t):
            return function(*t, reduction=reduction).sum()

        input, target = (t.float() for t in loss.make((5, 3, 4)))
        return [
            torch.func.grad(scalar, (0, 1))(input, target),
            torch.vmap(lambda *t: function(*t, reduction=reduction))(input, target),
            torch.vmap(torch.func.grad(scalar), (0, None))(input, target[0]),
            torch.func.jvp(scalar, (input, target), (target, input)),
            torch.func.hessian(scalar)(input[0], target[0]),
        ]

    torch.testing.assert_close(results(loss.ours), results(loss.torchs))


@all_losses
def test_functorch_around_a_gradient_of_a_plain_loss(loss):
    """The backward is mapped, not the loss."""

    def rows(function):
        leaves = [t.requires_grad_() for t in loss.make((3, 4))]
        value = function(*leaves, reduction="none")
        basis = torch.eye(12, dtype=torch.float64).view(12, 3, 4)
        return torch.autograd.grad(value, leaves, basis, is_grads_batched=True)

    torch.testing.assert_close(rows(loss.ours), rows(loss.torchs))


@all_losses
@all_reductions
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_derivatives(loss, reduction, requires_grad):
    def tangents(function):
        input, target = (t.requires_grad_(requires_grad) for t in loss.make((3, 4)))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.full_like(t, 0.5 + i)) for i, t in enumerate((input, target))]
            found = []
            for arguments in ((duals[0], target), (input, duals[1]), duals):
                found += [t.detach() for t in forward_ad.unpack_dual(function(*arguments, reduction=reduction))]
        return found

    torch.testing.assert_close(tangents(loss.ours), tangents(loss.torchs))


@all_losses
@all_reductions
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_autocast(loss, reduction, dtypes):
    def results(function):
        leaves = [t.to(d).requires_grad_() for t, d in zip(loss.make((3, 4)), dtypes, strict=True)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(*leaves, reduction=reduction)
        return value, *torch.autograd.grad(value.sum(), leaves)

    torch.testing.assert_close(results(loss.ours), results(loss.torchs), rtol=0, atol=0)


class Subclass(torch.Tensor):
    pass


class Recorded(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(str(function))
        return function(*args, **(kwargs or {}))


@all_losses
def test_subclasses_and_modes_see_torchs_function(loss):
    tensors = loss.make((3, 4))
    expected = loss.torchs(*tensors)
    before = kernel_calls(loss.name)
    assert type(loss.ours(tensors[0].as_subclass(Subclass), tensors[1])) is Subclass
    assert type(loss.ours(tensors[0], tensors[1].as_subclass(Subclass))) is Subclass
    with Recorded() as ours:
        torch.testing.assert_close(loss.ours(*tensors), expected)
    assert ours.functions[0] is loss.torchs
    seen = []
    for function in (loss.ours, loss.torchs):
        with Dispatched() as mode:
            function(*tensors)
        seen.append(mode.operators)
    assert seen[0] == seen[1]
    with FakeTensorMode() as mode:
        assert loss.ours(*[mode.from_tensor(t) for t in tensors]).shape == ()
    assert kernel_calls(loss.name) == before


@all_losses
def test_ours_may_replace_torchs(loss, monkeypatch):
    tensors = loss.make((3, 4))
    expected = loss.torchs(*tensors)
    monkeypatch.setattr(F, loss.name, loss.ours)
    torch.testing.assert_close(getattr(torch.nn, loss.module_name)()(*tensors), expected)
    with fastopt.count_calls() as calls, BaseTorchFunctionMode():
        torch.testing.assert_close(getattr(F, loss.name)(*tensors), expected)
    assert sum(calls[loss.name].values()) == 1
    torch.testing.assert_close(
        getattr(F, loss.name)(tensors[0].as_subclass(Subclass), tensors[1]).item(), expected.item()
    )
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: getattr(F, loss.name)(*t), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), expected)


@pytest.mark.native
@all_losses
def test_the_default_device_keeps_the_kernel(loss):
    tensors = loss.make((3, 4))
    before = kernel_calls(loss.name)
    with torch.device("cpu"):
        loss.ours(*tensors)
    assert kernel_calls(loss.name) == before + 1


@pytest.mark.native
@all_losses
def test_a_profiler_sees_the_loss(loss):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss.ours(*loss.make((3, 4)))
    assert f"fastopt::{loss.name}" in {event.name for event in profiler.events()}


# --- torch's databases ------------------------------------------------------------------------------------------------


@all_losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_torchs_operator_database(loss, dtype):
    (op,) = (op for op in op_db if op.name == f"nn.functional.{loss.name}")
    torch.manual_seed(0)
    samples = list(op.reference_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        tensors = [sample.input, *sample.args]
        results = []
        for function, convert in (
            (loss.ours, torch.Tensor.clone),
            (loss.torchs, torch.Tensor.clone),
            (loss.torchs, torch.Tensor.double),
        ):
            leaves = [convert(t.detach()).requires_grad_() for t in tensors]
            value = function(*leaves, **sample.kwargs)
            results.append([value, *torch.autograd.grad(value.sum(), leaves)])
        for found, expected, truth in zip(*results, strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert_no_worse(found, expected, truth, slack=4)


@all_losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_module_gives_what_torchs_module_gives(loss, dtype):
    (info,) = (info for info in module_db if info.module_cls is getattr(torch.nn, loss.module_name))
    torch.manual_seed(0)
    for case in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True):
        made, given = case.constructor_input, case.forward_input.args
        ours, theirs = (getattr(m, loss.module_name)(*made.args, **made.kwargs) for m in (fastopt, torch.nn))
        truth = copy.deepcopy(theirs)(*[t.double() for t in given])
        assert_no_worse(ours(*given), theirs(*given), truth, slack=4)
        if dtype == torch.float64 and case.reference_fn is not None:
            torch.testing.assert_close(ours(*given), case.reference_fn(ours, *given))
    if info.module_error_inputs_func is not None:
        for case in info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True):
            made, given = case.module_error_input.constructor_input, case.module_error_input.forward_input
            with pytest.raises(case.error_type, match=case.error_regex):
                getattr(fastopt, loss.module_name)(*made.args, **made.kwargs)(*given.args, **given.kwargs)
