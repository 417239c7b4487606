"""fastopt.count_calls: each path of a step and of a loss is counted where it runs, and nowhere else."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.overrides import BaseTorchFunctionMode

import fastopt
from common import is_native
from optimizers import NAMES

PATHS = ("kernel", "reference", "torch")
INPUT, TARGET = torch.randn(4, 10), torch.arange(4)


def default_path():
    """Of what the kernels take."""
    return "kernel" if is_native() else "reference"


def counts(**numbers):
    return {path: numbers.get(path, 0) for path in PATHS}


def make_optimizer(name="SGD", *params):
    params = params or [torch.nn.Parameter(torch.ones(3))]
    for param in params:
        param.grad = torch.ones_like(param)
    return getattr(fastopt, name)(params)


def loss_of(input, **options):
    return fastopt.functional.cross_entropy(input, TARGET, **options)


@pytest.mark.parametrize("name", NAMES)
def test_steps_count_on_the_path_they_take(name):
    optimizer = make_optimizer(name)
    optimizer.step()
    with fastopt.count_calls() as calls:
        optimizer.step()
        optimizer.step(lambda: torch.ones(()))
    assert calls.pop("step") == counts(**{default_path(): 2})
    assert set(map(str, calls.values())) == {str(counts())}


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_torch_count_once(name):
    optimizer = make_optimizer(name)
    with fastopt.count_calls() as calls, BaseTorchFunctionMode():
        optimizer.step()
    assert calls["step"] == counts(torch=1)


def test_a_step_whose_layouts_no_kernel_walks_counts_as_reference():
    optimizer = make_optimizer("SGD", torch.nn.Parameter(torch.ones(4, 6)[:, ::2]))
    with fastopt.count_calls() as calls:
        optimizer.step()
    assert calls["step"] == counts(reference=1)


def test_a_divided_step_counts_once_for_each_part():
    dense, strided = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    optimizer = make_optimizer("SGD", dense, strided)
    with fastopt.count_calls() as calls:
        optimizer.step()
    assert calls["step"] == (counts(kernel=1, reference=1) if is_native() else counts(reference=1))


def test_a_step_that_fails_does_not_count():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer("SGD", param)
    optimizer.param_groups[0]["lr"] = "fast"
    with fastopt.count_calls() as calls, pytest.raises(TypeError):
        optimizer.step()
    assert calls["step"] == counts()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_losses_count_on_the_path_they_take(requires_grad):
    input = INPUT.clone().requires_grad_(requires_grad)
    with fastopt.count_calls() as calls:
        loss = loss_of(input)
        if requires_grad:
            loss.backward()
    assert calls.pop("cross_entropy") == counts(**{default_path(): 1})
    assert set(map(str, calls.values())) == {str(counts())}


def test_a_gradient_that_is_computed_in_the_backward_counts_again():
    input = INPUT.clone().requires_grad_()
    with fastopt.count_calls() as calls:
        loss_of(input * 1, inplace_backward=True).backward()
    assert calls["cross_entropy"] == (counts(kernel=2) if is_native() else counts(reference=1))


def of_empty_logits():
    fastopt.functional.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), reduction="none")


def of_another_device():
    fastopt.functional.cross_entropy(INPUT.to("meta"), TARGET.to("meta"))


def of_a_function_mode():
    with BaseTorchFunctionMode():
        loss_of(INPUT)


def of_functorch():
    torch.func.vmap(lambda input: loss_of(input))(INPUT.expand(2, 4, 10))


def of_a_subclass():
    loss_of(INPUT.as_subclass(type("Subclass", (torch.Tensor,), {})))


def of_a_trace():
    torch.jit.trace(loss_of, (INPUT,), check_trace=False)


@pytest.mark.parametrize("call", [of_another_device, of_a_function_mode, of_a_subclass, of_a_trace])
def test_losses_of_torch_count_once(call):
    with fastopt.count_calls() as calls:
        call()
    assert calls["cross_entropy"] == counts(torch=1)


@pytest.mark.native
@pytest.mark.parametrize("call", [of_empty_logits, of_functorch])
def test_losses_that_the_extension_hands_to_torch_count_as_torchs(call):
    with fastopt.count_calls() as calls:
        call()
        loss_of(INPUT)
        call()
    assert calls["cross_entropy"] == counts(kernel=1, torch=2)


@pytest.mark.parametrize(("shape", "kernels"), [((4, 2000), 2), ((4, 5, 2), 0)], ids=["rows", "columns"])
def test_losses_with_a_process_group_count_where_they_run(shape, kernels):
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=1, store=fake.FakeStore())
    input = torch.randn(shape)
    try:
        with fastopt.count_calls() as calls:
            target = torch.zeros(input[:, 0].shape, dtype=torch.int64)
            options = {"process_group": dist.group.WORLD}
            fastopt.functional.cross_entropy(input.clone().requires_grad_(), target, **options).backward()
    finally:
        dist.destroy_process_group()
    is_kernel = is_native() and kernels
    assert calls["cross_entropy"] == (counts(kernel=kernels) if is_kernel else counts(reference=1))


def test_a_loss_that_fails_does_not_count():
    with fastopt.count_calls() as calls, pytest.raises(IndexError):
        fastopt.functional.cross_entropy(INPUT, TARGET + 7)
    assert calls["cross_entropy"] == counts()


def test_all_threads_count():
    def train():
        for _ in range(20):
            loss_of(torch.randn(4, 10_000))
            with BaseTorchFunctionMode():
                loss_of(INPUT)
            of_empty_logits()
            make_optimizer().step()

    threads = [threading.Thread(target=train) for _ in range(4)]
    with fastopt.count_calls() as calls:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert calls["step"] == counts(**{default_path(): 80})
    # Without a library, the reference takes empty logits too.
    assert calls["cross_entropy"] == (counts(kernel=80, torch=160) if is_native() else counts(reference=160, torch=80))


def test_blocks_may_be_nested_and_raise():
    with fastopt.count_calls() as outer:
        loss_of(INPUT)
        with pytest.raises(IndexError), fastopt.count_calls() as inner:
            fastopt.functional.cross_entropy(INPUT, TARGET + 7 * loss_of(INPUT).bool())
        loss_of(INPUT)
    assert inner["cross_entropy"] == counts(**{default_path(): 1})
    assert outer["cross_entropy"] == counts(**{default_path(): 3})


def test_a_compiled_loss_is_one_graph_and_counts_where_it_reaches_a_kernel():
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    compiled(INPUT)
    with fastopt.count_calls() as calls:
        compiled(INPUT)
    assert calls["cross_entropy"] == (counts(kernel=1) if is_native() else counts())


def test_a_compiled_step_counts_as_torchs():
    torch._dynamo.reset()  # after many programs Dynamo compiles no more of a function
    step = torch.compile(make_optimizer("Adam").step, backend="aot_eager")
    with fastopt.count_calls() as calls:
        step()
        step()
    assert calls["step"] == counts(torch=2)
