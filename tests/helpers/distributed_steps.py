"""Checks of single steps of DTensor parameters: gradients placed otherwise, loss scaling, version counters."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastopt
from common import error, is_native, kernel_calls
from distributed_modes import ADAM, MOMENTUM, OPTIMIZERS, Check, largest_difference, mesh, parameters, shard_all, whole
from distributed_modes import build as build_model
from optimizers import OURS, THEIRS

N_STEPS = 3
PLACEMENTS = {"sharded": Shard(0), "by column": Shard(1), "replicated": Replicate(), "partial": Partial()}


def values(seed):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_placed(optimizer_class, options, param_placement, grad_placement):
    """The parameter after some steps, its optimizer, and the kernels that ran; each process has a share of the sum."""
    on = mesh()
    param = torch.nn.Parameter(distribute_tensor(values(0), on, [PLACEMENTS[param_placement]]))
    optimizer = optimizer_class([param], **options)
    before = kernel_calls("update")
    for step in range(N_STEPS):
        grad = values(step + 1)
        if grad_placement == "partial":
            share = (dist.get_rank() + 1) * 2 / (dist.get_world_size() * (dist.get_world_size() + 1))
            param.grad = DTensor.from_local(grad * share, on, [Partial()], run_check=False)
        else:
            param.grad = distribute_tensor(grad, on, [PLACEMENTS[grad_placement]])
        optimizer.step()
    return param, optimizer, kernel_calls("update") - before


def check_placements(name, param_placement, grad_placement, _folder):
    cls, options = OPTIMIZERS[name]
    param, optimizer, n_calls = step_placed(getattr(OURS, cls), options, param_placement, grad_placement)
    alone = torch.nn.Parameter(values(0))
    truth = getattr(THEIRS, cls)([alone], **options)
    for step in range(N_STEPS):
        alone.grad = values(step + 1)
        truth.step()
    assert n_calls == (N_STEPS if is_native() else 0)
    assert list(param.placements) == [PLACEMENTS[param_placement]]
    for key, value in optimizer.state[param].items():
        assert key == "step" or value.placements == param.placements
        assert error(whole(value), truth.state[alone][key]) <= 1e-14
    return {"difference": error(whole(param), alone)}


def check_scaler(is_fused, _folder):
    """An overflow in one process skips the step of all."""
    options = dict(lr=0.1, **(dict(fused=True) if is_fused else {}))
    model = shard_all(build_model())
    twin = build_model()
    optimizer, truth = fastopt.Adam(model.parameters(), **options), torch.optim.Adam(twin.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for step in range(3):
        for i, (param, alone) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            grad = torch.full(alone.shape, 0.1 * (step + i + 1), dtype=torch.float64)
            alone.grad = grad.clone()
            grad = grad * scaler.get_scale()
            if step == 1 and i == 0:
                grad[0] = torch.inf  # of the first process's shard
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            truth.step()
    assert scaler.get_scale() == 4.0
    return {"difference": largest_difference(parameters(model), parameters(twin))}


def check_autograd_knows(_folder):
    """A graph that saved a parameter before the step cannot be run after it."""
    param = torch.nn.Parameter(distribute_tensor(values(0), mesh(), [Shard(0)]))
    optimizer = fastopt.Adam([param])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    return {}


def check_hooks_and_closure(_folder):
    param = torch.nn.Parameter(distribute_tensor(values(0), mesh(), [Shard(0)]))
    optimizer, seen = fastopt.Adam([param]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), DTensor)
    assert seen == ["pre", "post"]
    return {}


CHECKS = {
    f"placements/{name}/{param} parameter, {grad} gradient": Check(
        functools.partial(check_placements, name, param, grad), (2,)
    )
    for name in (MOMENTUM, ADAM)
    for param, grad in itertools.product(("sharded", "by column", "replicated"), PLACEMENTS)
}
CHECKS |= {
    "GradScaler": Check(functools.partial(check_scaler, False)),
    "GradScaler/fused": Check(functools.partial(check_scaler, True)),
    "autograd knows of a step": Check(check_autograd_knows, (2,)),
    "hooks and closure": Check(check_hooks_and_closure, (2,)),
}
