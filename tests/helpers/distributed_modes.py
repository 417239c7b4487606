"""Checks of optimizers in torch's distributed modes: after some steps the parameters are a single process's."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastopt
from common import kernel_calls
from optimizers import CONFIGURATIONS, OURS, THEIRS

N_STEPS, N_ROWS, N_FEATURES, N_HIDDEN, N_CLASSES = 20, 16, 10, 12, 3  # 3 classes on 4 processes: an empty shard
OPTIMIZERS = {
    "-".join([name.lower(), *(key for key in options if key not in ("lr", "weight_decay"))]): (name, options)
    for name, options in CONFIGURATIONS
}
MOMENTUM, ADAM, ADAMW = "sgd-momentum-nesterov", "adam-amsgrad", "adamw"  # where two or three must do


@dataclass(frozen=True)
class Check:
    run: Callable  # of a folder; returns what JSON can hold
    n_processes: tuple = (2, 4)


@dataclass(frozen=True)
class Mode:
    """A way to distribute a model. ``wrap`` returns the model that is trained."""

    wrap: Callable
    is_data_parallel: bool = True
    make_optimizer: Callable | None = None  # of the class, the parameters and the options
    n_micro_batches: int = 1
    hold_gradients: Callable | None = None  # of the model; a context in which gradients are not reduced
    max_norm: float | None = None
    n_processes: tuple = (2, 4)


def build(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(N_FEATURES, N_HIDDEN), nn.Tanh(), nn.Linear(N_HIDDEN, 5), nn.Tanh(), nn.Linear(5, N_CLASSES)]
    return nn.Sequential(*layers).to(dtype)


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(N_STEPS):
        inputs = torch.randn(N_ROWS, N_FEATURES, generator=generator, dtype=torch.float64)
        yield inputs.to(dtype), torch.randint(N_CLASSES, (N_ROWS,), generator=generator)


def mesh(*shape, names=None):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def shard_all(model, on=None, **options):
    """FSDP2: each linear layer, then the rest."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=on or mesh(), **options)
    return fully_shard(model, mesh=on or mesh(), **options)


def tensor_parallel(model, on=None):
    """The last layer stays as it is: plain parameters among DTensors."""
    return parallelize_module(model, on or mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def all_tensor_parallel(model):
    return parallelize_module(tensor_parallel(model), mesh(), {"4": RowwiseParallel(input_layouts=Replicate())})


def shard_twice(model):
    both = mesh(2, dist.get_world_size() // 2, names=("data", "tensor"))
    return shard_all(tensor_parallel(model, both["tensor"]), both["data"])


@contextlib.contextmanager
def hold_fsdp(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def zero(cls, params, options, **more):
    return ZeroRedundancyOptimizer(params, optimizer_class=cls, **more, **options)


MODES = {
    "ddp": Mode(DistributedDataParallel),
    "ddp-no_sync": Mode(DistributedDataParallel, n_micro_batches=2, hold_gradients=lambda model: model.no_sync()),
    "ddp-clip": Mode(DistributedDataParallel, max_norm=0.05),
    "fsdp1": Mode(functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))),
    "fsdp2": Mode(shard_all),
    "fsdp2-no_sync": Mode(shard_all, n_micro_batches=2, hold_gradients=hold_fsdp),
    "fsdp2-clip": Mode(shard_all, max_norm=0.05),
    "fsdp2-replicated": Mode(lambda model: shard_all(model, mesh(2, 2, names=("replica", "shard"))), n_processes=(4,)),
    "fsdp2-tensor_parallel": Mode(shard_twice, n_processes=(4,)),
    "tensor_parallel": Mode(tensor_parallel, is_data_parallel=False),
    "tensor_parallel-clip": Mode(all_tensor_parallel, is_data_parallel=False, max_norm=0.05),
    "zero": Mode(DistributedDataParallel, make_optimizer=zero),
    "zero-bucket_view": Mode(
        DistributedDataParallel, make_optimizer=functools.partial(zero, parameters_as_bucket_view=True)
    ),
}


def train(cls, options, mode=None, dtype=torch.float64):
    """The model and its optimizer after some steps: of this process alone, or all together in a mode.

    Returns:
        Both, and how many kernels ran.
    """
    model = build(dtype)
    n_parts, part = 1, 0
    if mode is not None:
        model = mode.wrap(model)
        if mode.is_data_parallel:
            n_parts, part = dist.get_world_size(), dist.get_rank()
            if mode.wrap is shard_twice:
                n_parts, part = 2, dist.get_rank() // (dist.get_world_size() // 2)
    make = mode and mode.make_optimizer
    optimizer = make(cls, model.parameters(), options) if make else cls(model.parameters(), **options)
    loss_function = fastopt.CrossEntropyLoss()
    before = kernel_calls("update")
    for inputs, targets in batches(dtype):
        optimizer.zero_grad()
        n_micro = mode.n_micro_batches if mode else 1
        for micro in range(n_micro):
            is_held = mode is not None and micro < n_micro - 1
            rows = slice(micro * n_parts + part, None, n_micro * n_parts)
            with mode.hold_gradients(model) if is_held else contextlib.nullcontext():
                (loss_function(model(inputs[rows]), targets[rows]) / n_micro).backward()
        if mode is not None and mode.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), mode.max_norm)
        optimizer.step()
    return model, optimizer, kernel_calls("update") - before


def parameters(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [param.detach().clone() for param in model.parameters()]
    return [whole(param) for param in model.parameters()]


@functools.cache
def alone(name, dtype=torch.float64, max_norm=None):
    """Parameters of the training by torch's optimizer in a single process."""
    cls, options = OPTIMIZERS[name]
    mode = Mode(lambda model: model, is_data_parallel=False, max_norm=max_norm)
    return parameters(train(getattr(THEIRS, cls), options, mode, dtype)[0])


def largest_difference(ours, theirs):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def check_mode(mode, name, dtype, _folder):
    cls, options = OPTIMIZERS[name]
    truth = alone(name, max_norm=mode.max_norm)
    model, optimizer, n_calls = train(getattr(OURS, cls), options, mode, dtype)
    result = {"fastopt": largest_difference(parameters(model), truth), "n_calls": n_calls}
    if dtype != torch.float64:
        torch_model, *_ = train(getattr(THEIRS, cls), options, mode, dtype)
        result["torch"] = largest_difference(parameters(torch_model), truth)
    for param, state in getattr(optimizer, "optim", optimizer).state.items():
        for key, value in state.items():
            is_scalar = key in ("step", "mu_product")
            assert isinstance(value, DTensor) == (isinstance(param, DTensor) and not is_scalar), key
            assert is_scalar or not isinstance(param, DTensor) or value.placements == param.placements, key
    return result


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

EVERY_OPTIMIZER = ("ddp", "fsdp2", "tensor_parallel", "zero")
CHECKS = {
    f"{mode_name}/{name}/float64": Check(
        functools.partial(check_mode, mode, name, torch.float64),
        mode.n_processes if name == ADAM or mode_name == "fsdp2" else (2,),
    )
    for mode_name, mode in MODES.items()
    for name in (OPTIMIZERS if mode_name in EVERY_OPTIMIZER else (ADAM,))
}
MIXED_MODE = Mode(functools.partial(shard_all, mp_policy=MIXED))
for mode_name, mode in (("ddp", MODES["ddp"]), ("fsdp2", MODES["fsdp2"]), ("fsdp2-mixed_precision", MIXED_MODE)):
    CHECKS[f"{mode_name}/{ADAMW}/float32"] = Check(functools.partial(check_mode, mode, ADAMW, torch.float32))
