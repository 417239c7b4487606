"""Counts which path the calls of fastopt took: kernels, reference or torch's own."""

import collections
import contextlib
import os
import threading

from torch.compiler import is_compiling

from ._build import native

_KERNELS = {"step": "update"}  # the name of each call among the extension's counts
_lock = threading.Lock()
_counts = collections.Counter()  # of the other paths, since the process began


def register(*losses):
    """Have :func:`count_calls` count these functions."""
    _KERNELS.update((loss, loss) for loss in losses)


def note(call, path):
    """Count a call that no kernel takes; nothing while a program is traced."""
    if not is_compiling():
        with _lock:
            _counts[call, path] += 1


@contextlib.contextmanager
def count_calls():
    """Count how often each path runs in a block, in all threads of this process.

        with fastopt.count_calls() as calls:
            loss = criterion(model(input), target)
            loss.backward()
            optimizer.step()
        assert calls["step"] == {"kernel": 1, "reference": 0, "torch": 0}

    A step is one call of an optimizer's ``step``, also where no parameter has a gradient. A step that is divided,
    because no kernel takes some of its parameters, counts once for each part. A kernel of cross-entropy counts each
    time it runs: again in the backward, where that computes the gradient, and twice a training step with
    ``process_group``. Calls that raise do not count; those of ``torch.ops.fastopt`` count where they reach a kernel.
    Of compiled programs, losses count where they reach a kernel, and steps as torch's, unless ``differentiable``. The
    last path of an optimizer that torch lacks, such as ``Lion``, counts as "torch".

    Entering the block loads the library, or compiles it, as the first use of a kernel does.

    Returns:
        A context manager that gives a dict. After the block, its "step" and that of each loss are dicts of numbers:
        "kernel", "reference" (plain torch of fastopt) and "torch" (torch's own implementation).

    Raises:
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    library = native.module()
    calls = {}
    before = _numbers(library)
    try:
        yield calls
    finally:
        for (call, path), number in _numbers(library).items():
            calls.setdefault(call, {})[path] = number - before[call, path]


def _numbers(library):
    """All counts since the process began, by call and path."""
    of_library = library.kernel_calls() if library is not None else {}
    kernels = {(call, "kernel"): of_library.get(name, 0) for call, name in _KERNELS.items()}
    with _lock:
        others = {(call, path): _counts[call, path] for call in _KERNELS for path in ("reference", "torch")}
    others["cross_entropy", "torch"] += of_library.get("torch_cross_entropy", 0)  # which the library hands to torch
    return {**kernels, **others}


def _after_fork_in_child():
    """A thread of the parent may hold the lock, and would never free the child's copy."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
