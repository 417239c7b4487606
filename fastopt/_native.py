"""Chooses what runs the kernels: the library compiled at installation, one compiled just in time, or plain torch.

A library is loaded only if it was built for exactly this torch and these sources. Where there is none and none can be
compiled, the reference path runs, after one warning. Nothing is decided before the first use.

The kernels for CUDA are in a library of their own, which the first CUDA tensor makes the extension open. Where there is
none, torch's own kernels run; a torch for ROCm, whose GPU tensors are CUDA tensors too, gets no library.
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
class Backend:
    """A loaded library, or the reference path (``module`` None), and why it was chosen.

    For CUDA tensors ``module`` is the extension too, and ``library`` the CUDA library that it has opened.
    """

    module: ModuleType | None
    reason: str
    library: Path | None = None
    failure: BuildError | None = None


_cpu_backend = None  # decided by the first use
_cuda_backend = None  # decided by the first CUDA tensor
_lock = threading.Lock()


def module():
    """The compiled extension module, or None where the reference path runs. The first call may compile.

    Raises:
        ValueError: ``FASTOPT_BACKEND`` is unknown.
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    backend = _cpu_backend or _resolve()
    failure = backend.failure
    if failure is not None and requested_backend() == "native":
        raise RuntimeError(f"FASTOPT_BACKEND=native, but the kernels cannot be used: {failure}") from failure
    return backend.module


def empty_cache():
    """Free the CPU memory that is kept for the next large gradient, as :func:`torch.cuda.empty_cache` does for a GPU.

    One block at most is kept: that of the large cross-entropy gradient which was freed last.

    Returns:
        Bytes that were freed.
    """
    backend = _cpu_backend
    return backend.module.empty_cache() if backend is not None and backend.module is not None else 0


def cuda():
    """True if our kernels run for CUDA tensors. The first call, for the first CUDA tensor, may compile.

    Raises:
        ValueError: ``FASTOPT_BACKEND`` or ``FASTOPT_CUDA`` is unknown.
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    backend = _cuda_backend or _resolve_cuda()
    failure = backend.failure
    if failure is not None and requested_backend() == "native":
        raise RuntimeError(f"FASTOPT_BACKEND=native, but the CUDA kernels cannot be used: {failure}") from failure
    return backend.module is not None


def build(verbose=False):
    """Make sure that there are libraries for the running torch, compiling them if need be.

    The one with the CUDA kernels is among them if ``FASTOPT_CUDA=1``, or if torch has CUDA and an nvcc is found.

    Args:
        verbose: pass the compiler's output on to stderr.

    Returns:
        Path of the library with the CPU kernels.

    Raises:
        RuntimeError: one cannot be built; the message has the cause and what to install.
    """
    global _cpu_backend
    with _lock:
        try:
            library = _find() or _jit.compile(_target(), verbose)
        except BuildError as error:
            raise RuntimeError(f"fastopt cannot be built: {error}") from error
        if _cpu_backend is not None and _cpu_backend.failure is not None:
            _cpu_backend = None  # what failed before is tried again
    build_cuda(verbose)
    return library


def build_cuda(verbose=False):
    """The part of :func:`build` for CUDA: path of the library, or None where it is not enabled."""
    global _cuda_backend
    if not _build_cuda.is_enabled_for(torch.version.cuda):
        return None
    with _lock:
        try:
            library = _native_cuda.find() or _native_cuda.compile(verbose)
        except BuildError as error:
            if isinstance(error, _build_cuda.NoNvcc) and not _build_cuda.requested():
                return None
            raise RuntimeError(f"the CUDA kernels cannot be built: {error}") from error
        if _cuda_backend is not None and _cuda_backend.failure is not None:
            _cuda_backend = None
    return library


def info():
    """Report on the kernels in use, and why these, as a dict. Loads a library that exists; never compiles one."""
    backend = _cpu_backend or _existing_backend()
    compiled = backend is not None and backend.module is not None
    instruction_set = backend.module.instruction_set() if compiled else None
    try:
        compiler = str(_build.find_compiler())
    except BuildError as error:
        compiler = error.reason
    if backend is None:
        name, reason = "not built yet", "the first use of a kernel, or python -m fastopt build, compiles the library"
    else:
        fallback = "none" if backend.failure and requested_backend() == "native" else "reference"
        name, reason = f"native-cpu-{instruction_set}" if compiled else fallback, backend.reason
    cuda, cuda_library = _info_of_cuda(backend)
    return {
        "version": sys.modules[__package__].__version__,
        "backend": name,
        "reason": reason,
        "library": str(backend.library) if compiled else None,
        "built_for_torch": _jit.read_identity(backend.library).get("torch") if compiled else None,
        "torch": str(torch.__version__),
        "instruction_set": instruction_set,
        "cuda": cuda,
        "cuda_archs": _native_cuda.archs(cuda_library) if cuda_library else [],
        "cuda_library": str(cuda_library) if cuda_library else None,
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "cache_dir": str(_jit.cache_dir()),
    }


def requested_backend():
    """The value of ``FASTOPT_BACKEND``.

    Raises:
        ValueError: it is unknown.
    """
    backend = os.environ.get("FASTOPT_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"FASTOPT_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _resolve():
    """Choose the backend of this process; compile if there is nothing to load; warn, once, if that fails."""
    global _cpu_backend
    requested = requested_backend()
    with _lock:
        if _cpu_backend is not None:
            return _cpu_backend
        try:
            backend = _reference() if requested == "reference" else _load(_find() or _jit.compile(_target()))
        except BuildError as error:
            backend = Backend(None, str(error), failure=error)
        _cpu_backend = backend
    if backend.failure is not None and requested == "auto":
        message = f"fastopt runs its slower pure-Python path: {backend.failure}"
        warnings.warn(f"{message} (FASTOPT_BACKEND=reference silences this)", RuntimeWarning, stacklevel=3)
    return backend


def _existing_backend():
    """The backend of this process, or None if it would have to be compiled first."""
    global _cpu_backend
    if requested_backend() == "reference":
        return _reference()
    with _lock:
        if _cpu_backend is None:
            try:
                library = _find()
                if library is None:
                    return None
                _cpu_backend = _load(library)
            except BuildError as error:
                return Backend(None, str(error), failure=error)
        return _cpu_backend


def _reference():
    return Backend(None, "FASTOPT_BACKEND=reference")


def _installed():
    """Path of the library that installation compiles."""
    return _build.HERE / _build.CpuLibrary.filename


def _target():
    _jit.file_locks()  # before a compiler is asked for, which is useless without them
    return _build.CpuLibrary(_build.find_compiler())


def _find():
    """A library that matches this process, or None."""
    return _installed() if _jit.matches(_installed(), _build.identity()) else _jit.cached(_target())


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
    return Backend(loaded, _how_compiled(library), library)


def _how_compiled(library):
    installed_for = _jit.read_identity(_installed())
    if library == _installed():
        return "compiled at installation, for this torch"
    if not installed_for:
        return "compiled just in time: installation compiled nothing"
    differs = [name for name, value in _build.identity().items() if installed_for.get(name) != value]
    return f"compiled just in time: the library from installation differs in {', '.join(differs)}"


def _resolve_cuda():
    """Choose the backend of CUDA tensors in this process; compile if need be; warn, once, if that fails."""
    global _cuda_backend
    requested, extension = requested_backend(), None if torch.version.hip else module()
    with _lock:
        if _cuda_backend is not None:
            return _cuda_backend
        try:
            backend = _without_cuda(extension is not None) or _load_cuda(
                extension, _native_cuda.find() or _native_cuda.compile()
            )
        except BuildError as error:
            backend = Backend(None, str(error), failure=error)
        _cuda_backend = backend
    if backend.failure is not None and requested == "auto":
        message = f"fastopt has no kernels for CUDA tensors here, torch's own serve them: {backend.failure}"
        warnings.warn(f"{message} (FASTOPT_CUDA=0 silences this)", RuntimeWarning, stacklevel=3)
    return backend


def _without_cuda(has_extension):
    """The backend where kernels for CUDA are not even looked for, or None."""
    if requested_backend() == "reference":
        return _reference()
    if torch.version.hip:
        return Backend(None, "this torch is for ROCm, and the kernels are for CUDA")
    if _build_cuda.requested() is False:
        return Backend(None, "FASTOPT_CUDA=0")
    if not has_extension:  # of which the user has been warned
        return Backend(None, "the library that would open the kernels cannot be used")
    return None


def _load_cuda(extension, library):
    _native_cuda.open_with(extension, library)
    return Backend(extension, _native_cuda.how_compiled(library), library)


def _existing_cuda_backend(extension):
    """The backend of CUDA tensors, or None if it must be looked for or compiled first."""
    global _cuda_backend
    if torch.version.cuda is None and not _build_cuda.requested():
        return Backend(None, "this torch is built without CUDA")
    if extension is None or not torch.cuda.is_initialized():  # which would take memory of every GPU
        return None
    with _lock:
        if _cuda_backend is None:
            library = _native_cuda.find()
            _cuda_backend = _load_cuda(extension, library) if library else None
        return _cuda_backend


def _info_of_cuda(backend):
    """The status line of CUDA, and the CUDA library if one is found."""
    extension = backend.module if backend else None
    library = None
    try:
        cuda = (
            _cuda_backend
            or _without_cuda(backend is None or extension is not None)
            or _existing_cuda_backend(extension)
        )
        if cuda is None:
            future, library = _native_cuda.status()
    except BuildError as error:
        cuda = Backend(None, str(error))
    if cuda is None:
        line = f"not looked at yet: {future}"
    elif cuda.module is None:
        line = f"none: {cuda.reason}"
    else:
        library = cuda.library
        line = f"native-cuda: {_native_cuda.names_of_gpus(library)}, {cuda.reason}"
    return " ".join(line.split()), library


def _after_fork_in_child():
    """A thread of the parent may hold the lock, and would never free the child's copy."""
    global _lock
    _lock = threading.Lock()
    _jit.close_locks_after_fork()
    _build.spawn_lock.release()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(
        before=_build.spawn_lock.acquire,
        after_in_parent=_build.spawn_lock.release,
        after_in_child=_after_fork_in_child,
    )
