"""Says what serves the kernels: the library compiled at installation, one compiled just in time, or plain torch.

A library is loaded only if it was built for exactly this torch and these sources. Where there is none and none can be
compiled, the reference path serves, after one warning. Nothing is settled before the first use.
"""

import importlib.util
import os
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from . import _build, _jit
from ._build import BuildError

BACKENDS = ("auto", "native", "reference")


@dataclass(frozen=True)
class Served:
    """What serves: a loaded library, or the reference path (``module`` None), and why."""

    module: ModuleType | None
    reason: str
    library: Path | None = None
    failure: BuildError | None = None


_served = None  # settled by the first use
_lock = threading.Lock()


def module():
    """The compiled extension module, or None where the reference path serves. The first call may compile.

    Raises:
        ValueError: ``FASTOPT_BACKEND`` is unknown.
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    served = _served or _settle()
    if served.failure is not None and _backend() == "native":
        raise RuntimeError(f"FASTOPT_BACKEND=native, but the kernels cannot be used: {served.failure}")
    return served.module


def build(verbose=False):
    """Make sure that there is a library for the running torch, compiling it if need be.

    Args:
        verbose: pass the compiler's output on to stderr.

    Returns:
        Path of the library.

    Raises:
        RuntimeError: it cannot be built; the message says why and what to install.
    """
    global _served
    with _lock:
        try:
            library = _find() or _jit.compile(verbose)
        except BuildError as error:
            raise RuntimeError(f"fastopt cannot be built: {error}") from error
        if _served is not None and _served.failure is not None:
            _served = None  # what failed before is tried again
    return library


def info():
    """What serves the kernels and why, as a dict. Loads a library that is there; never compiles one."""
    served = _served or _peek()
    compiled = served is not None and served.module is not None
    instruction_set = served.module.instruction_set() if compiled else None
    try:
        compiler = str(_build.find_compiler())
    except BuildError as error:
        compiler = error.reason
    if served is None:
        backend, reason = "not built yet", "the first use of a kernel, or python -m fastopt build, compiles the library"
    else:
        backend, reason = f"native-cpu-{instruction_set}" if compiled else "reference", served.reason
    return {
        "version": sys.modules[__package__].__version__,
        "backend": backend,
        "reason": reason,
        "library": str(served.library) if compiled else None,
        "built_for_torch": _jit.read_identity(served.library).get("torch") if compiled else None,
        "torch": str(torch.__version__),
        "instruction_set": instruction_set,
        "cuda_archs": [],
        "cuda": "none: this version has kernels for the CPU only",
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "cache_dir": str(_jit.cache_dir()),
    }


def _backend():
    backend = os.environ.get("FASTOPT_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"FASTOPT_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _settle():
    """Decide what serves this process; compile if there is nothing to load; warn, once, if that fails."""
    global _served
    backend = _backend()
    with _lock:
        if _served is not None:
            return _served
        try:
            served = _reference() if backend == "reference" else _load(_find() or _jit.compile())
        except BuildError as error:
            served = Served(None, str(error), failure=error)
        _served = served
    if served.failure is not None and backend == "auto":
        message = f"fastopt runs its slower pure-Python path: {served.failure}"
        warnings.warn(f"{message} (FASTOPT_BACKEND=reference silences this)", RuntimeWarning, stacklevel=3)
    return served


def _peek():
    """What would serve, or None if that would have to be compiled first."""
    global _served
    if _backend() == "reference":
        return _reference()
    with _lock:
        if _served is None:
            try:
                library = _find()
                if library is None:
                    return None
                _served = _load(library)
            except BuildError as error:
                return Served(None, str(error), failure=error)
        return _served


def _reference():
    return Served(None, "FASTOPT_BACKEND=reference")


def _installed():
    """Where installation leaves a library that it compiled."""
    return _build.HERE / _jit.LIBRARY


def _find():
    """A library that fits this process, or None."""
    return _installed() if _jit.fits(_jit.read_identity(_installed())) else _jit.cached()


def _load(library):
    """Import a library; once in a process, for operators and classes are registered only once."""
    loaded = sys.modules.get("fastopt._C")
    if loaded is None:
        spec = importlib.util.spec_from_file_location("fastopt._C", library)
        try:
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        except (ImportError, RuntimeError) as error:
            raise BuildError(f"{library} cannot be loaded: {error}", "delete it and try again") from error
        sys.modules["fastopt._C"] = loaded
    library = Path(loaded.__file__)
    return Served(loaded, _how_compiled(library), library)


def _how_compiled(library):
    installed_for = _jit.read_identity(_installed())
    if library == _installed():
        return "compiled at installation, for this torch"
    if not installed_for:
        return "compiled just in time: installation compiled nothing"
    differs = [name for name, value in _build.identity().items() if installed_for.get(name) != value]
    return f"compiled just in time: the library from installation differs in {', '.join(differs)}"


def _after_fork_in_child():
    """A thread of the parent may hold the lock, and would never free the child's copy."""
    global _lock
    _lock = threading.Lock()
    _jit.close_locks_after_fork()
    _build.spawning.release()


os.register_at_fork(
    before=_build.spawning.acquire,
    after_in_parent=_build.spawning.release,
    after_in_child=_after_fork_in_child,
)
