"""Says what serves the kernels: the library compiled at installation, one compiled just in time, or plain torch.

A library is loaded only if it was built for exactly this torch and these sources. Where there is none and none can be
compiled, the reference path serves, after one warning. Nothing is settled before the first use.

The kernels for CUDA are in a library of their own, which the first CUDA tensor makes the extension open. Where there is
none, torch serves CUDA tensors; a torch for ROCm, whose GPU tensors are CUDA tensors too, gets no library.
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

from . import _build, _build_cuda, _jit, _native_cuda
from ._build import BuildError

BACKENDS = ("auto", "native", "reference")


@dataclass(frozen=True)
class Served:
    """What serves: a loaded library, or the reference path (``module`` None), and why.

    For CUDA tensors ``module`` is the extension too, and ``library`` the one that it has opened.
    """

    module: ModuleType | None
    reason: str
    library: Path | None = None
    failure: BuildError | None = None


_served = None  # settled by the first use
_served_cuda = None  # settled by the first CUDA tensor
_lock = threading.Lock()


def module():
    """The compiled extension module, or None where the reference path serves. The first call may compile.

    Raises:
        ValueError: ``FASTOPT_BACKEND`` is unknown.
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    served = _served or _settle()
    failure = served.failure
    if failure is not None and wanted_backend() == "native":
        raise RuntimeError(f"FASTOPT_BACKEND=native, but the kernels cannot be used: {failure}") from failure
    return served.module


def empty_cache():
    """Free the CPU memory that is kept for the next large gradient, as :func:`torch.cuda.empty_cache` does for a GPU.

    One block at most is kept: that of the large cross-entropy gradient which was freed last.

    Returns:
        Bytes that were freed.
    """
    served = _served
    return served.module.empty_cache() if served is not None and served.module is not None else 0


def cuda():
    """Whether kernels serve CUDA tensors. The first call, for the first CUDA tensor, may compile.

    Raises:
        ValueError: ``FASTOPT_BACKEND`` or ``FASTOPT_CUDA`` is unknown.
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    served = _served_cuda or _settle_cuda()
    failure = served.failure
    if failure is not None and wanted_backend() == "native":
        raise RuntimeError(f"FASTOPT_BACKEND=native, but the CUDA kernels cannot be used: {failure}") from failure
    return served.module is not None


def build(verbose=False):
    """Make sure that there are libraries for the running torch, compiling them if need be.

    The one with the CUDA kernels is among them if ``FASTOPT_CUDA=1``, or if torch has CUDA and an nvcc is found.

    Args:
        verbose: pass the compiler's output on to stderr.

    Returns:
        Path of the library with the CPU kernels.

    Raises:
        RuntimeError: one cannot be built; the message says why and what to install.
    """
    global _served
    with _lock:
        try:
            library = _find() or _jit.compile(_kind(), verbose)
        except BuildError as error:
            raise RuntimeError(f"fastopt cannot be built: {error}") from error
        if _served is not None and _served.failure is not None:
            _served = None  # what failed before is tried again
    build_cuda(verbose)
    return library


def build_cuda(verbose=False):
    """The part of :func:`build` for CUDA: path of the library, or None where none is wanted."""
    global _served_cuda
    if not _build_cuda.is_wanted_for(torch.version.cuda):
        return None
    with _lock:
        try:
            library = _native_cuda.find() or _native_cuda.compile(verbose)
        except BuildError as error:
            if isinstance(error, _build_cuda.NoNvcc) and not _build_cuda.wanted():
                return None
            raise RuntimeError(f"the CUDA kernels cannot be built: {error}") from error
        if _served_cuda is not None and _served_cuda.failure is not None:
            _served_cuda = None
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
        fallback = "none" if served.failure and wanted_backend() == "native" else "reference"
        backend, reason = f"native-cpu-{instruction_set}" if compiled else fallback, served.reason
    cuda, cuda_library = _info_of_cuda(served)
    return {
        "version": sys.modules[__package__].__version__,
        "backend": backend,
        "reason": reason,
        "library": str(served.library) if compiled else None,
        "built_for_torch": _jit.read_identity(served.library).get("torch") if compiled else None,
        "torch": str(torch.__version__),
        "instruction_set": instruction_set,
        "cuda": cuda,
        "cuda_archs": _native_cuda.archs(cuda_library) if cuda_library else [],
        "cuda_library": str(cuda_library) if cuda_library else None,
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "cache_dir": str(_jit.cache_dir()),
    }


def wanted_backend():
    """What ``FASTOPT_BACKEND`` asks for.

    Raises:
        ValueError: it is unknown.
    """
    backend = os.environ.get("FASTOPT_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"FASTOPT_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _settle():
    """Decide what serves this process; compile if there is nothing to load; warn, once, if that fails."""
    global _served
    backend = wanted_backend()
    with _lock:
        if _served is not None:
            return _served
        try:
            served = _reference() if backend == "reference" else _load(_find() or _jit.compile(_kind()))
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
    if wanted_backend() == "reference":
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
    return _build.HERE / _build.CpuLibrary.filename


def _kind():
    _jit.file_locks()  # before a compiler is asked for, which would be of no use without them
    return _build.CpuLibrary(_build.find_compiler())


def _find():
    """A library that fits this process, or None."""
    return _installed() if _jit.fits(_installed(), _build.identity()) else _jit.cached(_kind())


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


def _settle_cuda():
    """Decide what serves CUDA tensors in this process; compile if need be; warn, once, if that fails."""
    global _served_cuda
    backend, extension = wanted_backend(), None if torch.version.hip else module()
    with _lock:
        if _served_cuda is not None:
            return _served_cuda
        try:
            served = _without_cuda(extension is not None) or _load_cuda(
                extension, _native_cuda.find() or _native_cuda.compile()
            )
        except BuildError as error:
            served = Served(None, str(error), failure=error)
        _served_cuda = served
    if served.failure is not None and backend == "auto":
        message = f"fastopt has no kernels for CUDA tensors here, torch's own serve them: {served.failure}"
        warnings.warn(f"{message} (FASTOPT_CUDA=0 silences this)", RuntimeWarning, stacklevel=3)
    return served


def _without_cuda(has_extension):
    """What serves where kernels for CUDA are not even looked for, or None."""
    if wanted_backend() == "reference":
        return _reference()
    if torch.version.hip:
        return Served(None, "this torch is for ROCm, and the kernels are for CUDA")
    if _build_cuda.wanted() is False:
        return Served(None, "FASTOPT_CUDA=0")
    if not has_extension:  # of which the user has been warned
        return Served(None, "the library that would open the kernels cannot be used")
    return None


def _load_cuda(extension, library):
    _native_cuda.open_with(extension, library)
    return Served(extension, _native_cuda.how_compiled(library), library)


def _peek_cuda(extension):
    """What would serve CUDA tensors if one came, or None if that must be looked for or compiled first."""
    global _served_cuda
    if torch.version.cuda is None and not _build_cuda.wanted():
        return Served(None, "this torch is built without CUDA")
    if extension is None or not torch.cuda.is_initialized():  # which would take memory of every GPU
        return None
    with _lock:
        if _served_cuda is None:
            library = _native_cuda.find()
            _served_cuda = _load_cuda(extension, library) if library else None
        return _served_cuda


def _info_of_cuda(served):
    """A line about CUDA tensors, and the library with their kernels if one is found."""
    extension = served.module if served else None
    library = None
    try:
        cuda = _served_cuda or _without_cuda(served is None or extension is not None) or _peek_cuda(extension)
        if cuda is None:
            will, library = _native_cuda.outlook()
    except BuildError as error:
        cuda = Served(None, str(error))
    if cuda is None:
        line = f"not looked at yet: {will}"
    elif cuda.module is None:
        line = f"none: {cuda.reason}"
    else:
        library = cuda.library
        line = f"native-cuda: {_native_cuda.serves(library)}, {cuda.reason}"
    return " ".join(line.split()), library


def _after_fork_in_child():
    """A thread of the parent may hold the lock, and would never free the child's copy."""
    global _lock
    _lock = threading.Lock()
    _jit.close_locks_after_fork()
    _build.spawning.release()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(
        before=_build.spawning.acquire,
        after_in_parent=_build.spawning.release,
        after_in_child=_after_fork_in_child,
    )
