"""The demo under torchrun: several processes train one model, each on its share of every batch.

Gradients are averaged by :class:`torch.nn.parallel.DistributedDataParallel`. In a single process it does nothing.
"""

import contextlib
import os

import torch
import torch.distributed as dist


@contextlib.contextmanager
def joined(device):
    """The processes that torchrun has launched work together inside; yields the device of this one."""
    if not is_launched():
        yield device
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
        # Its threads must have released their Python objects: one that does so while Python ends makes torch abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def is_launched():
    """True if torchrun has launched this process as one of several."""
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def count():
    return dist.get_world_size() if is_launched() else 1


def rank():
    """This process's number, from 0; the first one prints and writes files."""
    return dist.get_rank() if is_launched() else 0


def share(items):
    """The part of a sequence that is this process's."""
    return items[rank() :: count()]


def gathered(value):
    """The value of each process, in all of them."""
    values = [value] * count()
    if is_launched():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_before_others():
    """The first process runs the body, then the others do."""
    if rank() > 0:
        dist.barrier()
    yield
    if is_launched() and rank() == 0:
        dist.barrier()
