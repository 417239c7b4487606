"""Checks of checkpoints: between fastopt and torch.optim both ways, and from 2 processes to 4."""

import copy
import functools
import itertools

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import fastopt
from distributed_modes import (
    ADAM,
    MOMENTUM,
    N_STEPS,
    OPTIMIZERS,
    Check,
    alone,
    batches,
    build,
    largest_difference,
    parameters,
    shard_all,
    tensor_parallel,
    zero,
)
from optimizers import OURS, THEIRS

MODULES = {"fastopt": fastopt, "torch": torch.optim}
WRAPS = {"fsdp2": shard_all, "tensor_parallel": tensor_parallel}
HALF = N_STEPS // 2


def make(side, name, wrap):
    cls, options = OPTIMIZERS[name]
    model = wrap(build())
    return model, getattr(MODULES[side], cls)(model.parameters(), **options)


def train(model, optimizer, first, last, is_data_parallel=True):
    parts = (dist.get_rank(), None, dist.get_world_size()) if is_data_parallel else (None,)
    for inputs, targets in itertools.islice(batches(), first, last):
        optimizer.zero_grad()
        fastopt.CrossEntropyLoss()(model(inputs[slice(*parts)]), targets[slice(*parts)]).backward()
        optimizer.step()


def whole_run(model, optimizer, name, mode_name):
    """Train the second half and compare with a single process that trained both."""
    train(model, optimizer, HALF, N_STEPS, mode_name == "fsdp2")
    return {"difference": largest_difference(parameters(model), alone(name))}


def saved(folder, side, name, mode_name):
    return folder / f"{side}-{name}-{mode_name}"


def check_save(side, name, mode_name, folder):
    model, optimizer = make(side, name, WRAPS[mode_name])
    train(model, optimizer, 0, HALF, mode_name == "fsdp2")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    path = saved(folder, side, name, mode_name)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    return whole_run(model, optimizer, name, mode_name)


def check_load(side, name, mode_name, by, folder):
    """Into ``by``, of a run of 2 processes by ``side``."""
    model, optimizer = make(by, name, WRAPS[mode_name])
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=saved(folder, side, name, mode_name))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return whole_run(model, optimizer, name, mode_name)


def check_full_state(name, _folder):
    """All of the state in the first process, from there to an optimizer of torch's, and back."""
    model, optimizer = make("fastopt", name, shard_all)
    train(model, optimizer, 0, HALF)
    in_one = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for_all = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for side in ("torch", "fastopt"):
        state = get_optimizer_state_dict(model, optimizer, options=in_one)
        cls, options = OPTIMIZERS[name]
        optimizer = getattr(MODULES[side], cls)(model.parameters(), **options)
        optimizer.zero_grad()  # else torch makes no state to load into
        set_optimizer_state_dict(model, optimizer, state, options=for_all)
    return whole_run(model, optimizer, name, "fsdp2")


def check_zero(name, _folder):
    """The shards of a ``ZeroRedundancyOptimizer``, put together, are the state of one optimizer."""
    cls, options = OPTIMIZERS[name]
    model = DistributedDataParallel(build())
    optimizer = zero(getattr(OURS, cls), model.parameters(), options)
    train(model, optimizer, 0, HALF)
    optimizer.consolidate_state_dict(to=0)
    states = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    alone_again = build()
    alone_again.load_state_dict(model.module.state_dict())
    one = getattr(THEIRS, cls)(alone_again.parameters(), **options)
    one.load_state_dict(copy.deepcopy(states[0]))  # torch keeps the tensors that it is given
    train(alone_again, one, HALF, N_STEPS, is_data_parallel=False)
    optimizer.load_state_dict(states[0])
    train(model, optimizer, HALF, N_STEPS)
    ours = largest_difference(parameters(model), alone(name))
    return {"difference": max(ours, largest_difference(parameters(alone_again), alone(name)))}


CHECKS = {}
for name, mode_name in ((MOMENTUM, "fsdp2"), (ADAM, "fsdp2"), (ADAM, "tensor_parallel")):
    for side in MODULES:
        what = f"{mode_name}/{name}"
        CHECKS[f"checkpoint/{what}/saved by {side}"] = Check(
            functools.partial(check_save, side, name, mode_name), n_processes=(2,)
        )
        for by in MODULES:
            if "fastopt" in (side, by):
                CHECKS[f"checkpoint/{what}/{side} to {by}"] = Check(
                    functools.partial(check_load, side, name, mode_name, by), (2, 4) if side != by else (2,)
                )
for name in (MOMENTUM, ADAM):
    CHECKS[f"checkpoint/full state/{name}"] = Check(functools.partial(check_full_state, name))
    CHECKS[f"checkpoint/zero/{name}"] = Check(functools.partial(check_zero, name))
