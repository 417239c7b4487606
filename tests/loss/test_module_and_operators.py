"""Copies of a loss with a process group, and what modules, scripts and operators refuse."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastopt
from loss_cases import Options
from loss_helpers import OPTIONS, T, X, cross_entropy, make_case, shapes

# --- A process group --------------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def saved_by_torch(module, weights_only=False):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES = {
    "copied": copy.copy,
    "deeply copied": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "saved by torch": saved_by_torch,
    "averaged": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_loss_with_a_process_group_can_be_copied(kind, group):
    for of in (group, torch.distributed.new_group([0])):
        module = fastopt.CrossEntropyLoss(torch.linspace(1, 2, 10), label_smoothing=0.1, process_group=of)
        model = torch.nn.Sequential(torch.nn.Identity(), module)
        for found in (COPIES[kind](module), COPIES[kind](model)[1]):
            assert found.process_group is of
            assert found.label_smoothing == 0.1
            torch.testing.assert_close(found(X, T), module(X, T))
        assert module.process_group is of
        assert list(module.state_dict()) == ["weight"]


def test_loss_loaded_without_its_process_group_raises_a_clear_error(group):
    module = fastopt.CrossEntropyLoss(process_group=torch.distributed.new_group([0]))
    saved, copied = pickle.dumps(module), copy.deepcopy(module)
    torch.distributed.destroy_process_group()
    loaded = pickle.loads(saved)
    with pytest.raises(RuntimeError, match="process_group must be set"):
        loaded(X, T)
    again = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))
    with pytest.raises(RuntimeError, match="process_group must be set"):
        again(X, T)
    for other in (loaded, again, copied):
        other.process_group = None
        torch.testing.assert_close(other(X, T), F.cross_entropy(X, T))


def test_a_process_group_and_inplace_backward_are_refused_together(group):
    x = (X.clone().requires_grad_()) * 1
    for call in (
        lambda: cross_entropy(x, T, inplace_backward=True, process_group=group),
        lambda: fastopt.CrossEntropyLoss(inplace_backward=True, process_group=group)(x, T),
    ):
        with pytest.raises(ValueError, match="inplace_backward must be False with process_group, got True"):
            call()
    torch.testing.assert_close(cross_entropy(X, T, process_group=group), F.cross_entropy(X, T))


# --- The operators ----------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("options", [*OPTIONS, Options("index", True, 0.1, "class", "sum")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operators_give_torchs_gradient(logits, options, dtype):
    x, target, arguments = make_case(logits, options, dtype)
    reduction = torch.nn._reduction.get_enum(options.reduction)
    args = (target, arguments["weight"], reduction, arguments["ignore_index"], arguments["label_smoothing"])

    wide = {name: value.double() if torch.is_tensor(value) else value for name, value in arguments.items()}
    expected_x = x.double().requires_grad_()
    expected = F.cross_entropy(expected_x, target.double() if target.is_floating_point() else target, **wide)
    grad_output = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    (expected_grad,) = torch.autograd.grad(expected, expected_x, grad_output)

    ops = torch.ops.fastopt
    loss, grad = ops.cross_entropy_forward(x, *args, True)
    kept_loss, keeper = ops.cross_entropy_keep(x, *args)
    grad_output = grad_output.to(dtype)
    found = (ops.cross_entropy_backward(grad_output, grad, x), ops.cross_entropy_take(grad_output, keeper, x, *args))
    tolerances = dict(rtol=0, atol=1e-12) if dtype == torch.float64 else dict(rtol=0.01, atol=0.01)
    for one in (loss, kept_loss):
        torch.testing.assert_close(one.double(), expected.detach(), equal_nan=True, **tolerances)
    for one in found:
        torch.testing.assert_close(one.double(), expected_grad, equal_nan=True, **tolerances)


# --- What the operators and scripts refuse ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_script_refuses_to_overwrite_a_leaf():
    scripted = torch.jit.script(fastopt.CrossEntropyLoss(inplace_backward=True))
    leaf = X.clone().requires_grad_()
    for _ in range(3):  # the profiling executor rewrites the graph
        with pytest.raises(Exception, match="a leaf Variable that requires grad"):
            scripted(leaf, T)
        scripted(leaf * 1, T).backward()
        with torch.no_grad():
            scripted(leaf, T)


@pytest.mark.parametrize("reduction", [7, -1, 3, 2**40])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_refuse_a_number_that_is_no_reduction(reduction, requires_grad):
    x = X.clone().requires_grad_(requires_grad)
    targets = (T, torch.softmax(X, 1), T.int())
    for target in targets:
        for call in (
            lambda t: torch.ops.fastopt.cross_entropy(x, t, None, reduction),
            lambda t: torch.ops.fastopt.cross_entropy_forward(x, t, None, reduction, -100, 0.0, requires_grad),
        ):
            with pytest.raises(ValueError, match=f"reduction must be 0 .*got {reduction}"):
                call(target)
    for compiled in (torch.compile(torch.ops.fastopt.cross_entropy, backend="aot_eager"),):
        with pytest.raises(Exception, match="reduction must be 0"):
            compiled(x, T, None, reduction)
    torch.compiler.reset()
    with pytest.raises(ValueError, match="reduction must be 0"):
        torch.ops.fastopt.cross_entropy(X.to("meta"), T.to("meta"), None, reduction)


UPDATES = {
    "sgd_": lambda p: (torch.ops.fastopt.sgd_, ([p], [torch.ones(3)], [torch.zeros(3)]), dict(lr=0.1, momentum=0.9)),
    "rmsprop_": lambda p: (
        torch.ops.fastopt.rmsprop_,
        ([p], [torch.ones(3)], [torch.zeros(3)], [], [], [torch.tensor(0.0)]),
        dict(lr=0.1),
    ),
    "adam_": lambda p: (
        torch.ops.fastopt.adam_,
        ([p], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [], [torch.tensor(0.0)]),
        dict(lr=0.1),
    ),
}


@pytest.mark.parametrize("name", UPDATES)
def test_update_operators_refuse_a_parameter_that_requires_grad(name):
    for p in (torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True) * 1):
        operator, args, options = UPDATES[name](p)
        with pytest.raises(RuntimeError):
            operator(*args, **options)
        assert torch.equal(p, torch.ones(3))
        with torch.no_grad():
            operator(*args, **options)
        assert not torch.equal(p, torch.ones(3))
