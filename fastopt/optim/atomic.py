"""Steps that happen as a whole or not at all."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits for the end of the block: an update in many small pieces is never left halfway."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting = []
    try:
        signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    except ValueError:  # not the main interpreter: it never sees Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[-1])


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
    tensors = [t for t in tensors if not t.is_meta and not t.is_inference()]
    before = [(t, t._version, t.detach().clone()) for t in tensors]
    try:
        yield
    except BaseException:
        for tensor, version, values in before:
            if tensor._version != version:
                tensor.copy_(values)
        raise
