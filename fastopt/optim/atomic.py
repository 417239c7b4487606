"""Steps that happen as a whole or not at all."""

import contextlib
import os
import threading

import torch


class StepLocks(dict):
    """An optimizer's lock in each process: a forked child has not the threads that may hold the parent's."""

    def __reduce__(self):  # copied and pickled without locks
        return StepLocks, ()


def lock_of(optimizer):
    """One thread at a time steps an optimizer: torch's operators let other threads in, between reading and writing."""
    locks = vars(optimizer).setdefault("_step_locks", StepLocks())
    return locks.setdefault(os.getpid(), threading.RLock())


@contextlib.contextmanager
def restoring_state(optimizer):
    """A failure takes back what the block made or replaced in the optimizer's state; tensors keep their values."""
    before = [(p, state, dict(state) if isinstance(state, dict) else None) for p, state in optimizer.state.items()]
    try:
        yield
    except BaseException:
        optimizer.state.clear()
        for param, state, items in before:
            optimizer.state[param] = state
            if items is not None:
                state.clear()
                state.update(items)
        raise


@contextlib.contextmanager
def restoring_values(tensors):
    """A failure takes back what the block wrote into the tensors; under ``torch.no_grad``."""
    is_inference = torch.is_inference_mode_enabled()
    before = [(t, _version(t, is_inference), t.detach().clone()) for t in tensors if not t.is_meta]
    try:
        yield
    except BaseException:
        for tensor, version, values in before:
            if version is None or _version(tensor, is_inference) != version:
                _write(tensor, values)
        raise


def dense_tensors(optimizer):
    """Parameters that have a gradient, and their states; not those with a sparse gradient, whose size may be huge."""
    tensors = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout == torch.strided:
                state = optimizer.state.get(param, {})
                tensors += [param, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    return tensors


def _version(tensor, is_inference):
    """None where no versions are counted: of tensors made in inference mode, and of all while it is on."""
    return None if is_inference or tensor.is_inference() else tensor._version


def _write(tensor, values):
    if tensor.is_inference():  # torch has written it, and raised then
        with torch.inference_mode():
            tensor.copy_(values)
    else:
        tensor.copy_(values)
