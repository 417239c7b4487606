"""Steps that happen as a whole or not at all."""

import contextlib

import torch


@contextlib.contextmanager
def state_as_it_was(optimizer):
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
def values_as_they_were(tensors):
    """A failure takes back what the block wrote into the tensors; under ``torch.no_grad``."""
    is_inference = torch.is_inference_mode_enabled()  # which counts no versions, and alone writes inference tensors
    tensors = [t for t in tensors if not t.is_meta and (is_inference or not t.is_inference())]
    before = [(t, None if is_inference else t._version, t.detach().clone()) for t in tensors]
    try:
        yield
    except BaseException:
        for tensor, version, values in before:
            if version is None or tensor._version != version:
                tensor.copy_(values)
        raise
