"""The libraries that run in this process: the one compiled at installation, or one compiled just in time.

A library is loaded only if it was built for exactly this torch and these sources. Where there is none and none can be
compiled, the reference path runs, after one warning. Nothing is decided before the first use. The kernels for CUDA are
in a library of their own; see native_cuda.py.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from . import cache, cuda as cuda_recipe, identity
from .backend import Backend, Kernels
from .commands import BuildError
from .environment import cache_dir, flag, requested_backend
from .native_cuda import CudaKernels, archs
from .nvcc import NoNvcc
from .recipe import CpuLibrary, find_compiler

INSTALLED = identity.PACKAGE / CpuLibrary.filename  # compiled by installation


class CpuKernels(Kernels):
    """The kernels for CPU tensors, in the extension module."""

    name = "kernels"
    warning = "fastopt runs its slower pure-Python path: {} (FASTOPT_BACKEND=reference silences this)"

    def find(self):
        return INSTALLED if identity.matches(INSTALLED, CpuLibrary.identity()) else cache.cached(self._target())

    def compile(self, verbose=False):
        return cache.compile(self._target(), verbose)

    def load(self, library):
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
        return Backend(loaded, self._origin(library), library)

    def existing(self):
        return self.unavailable() or super().existing()

    @staticmethod
    def _target():
        cache.file_locks()  # before a compiler is asked for, which is useless without them
        return CpuLibrary(find_compiler())

    @staticmethod
    def _origin(library):
        if library == INSTALLED:
            return "compiled at installation, for this torch"
        installed_for = identity.read(INSTALLED)
        if not installed_for:
            return "compiled just in time: installation compiled nothing"
        differs = [name for name, value in CpuLibrary.identity().items() if installed_for.get(name) != value]
        return f"compiled just in time: the library from installation differs in {', '.join(differs)}"


cpu_kernels = CpuKernels()
cuda_kernels = CudaKernels(cpu_kernels)


def module():
    """The compiled extension module, or None where the reference path runs. The first call may compile.

    Raises:
        ValueError: ``FASTOPT_BACKEND`` is unknown.
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    backend = cpu_kernels.backend or cpu_kernels.resolve()
    if backend.failure is not None:
        cpu_kernels.raise_if_requested(backend.failure)
    return backend.module


def cuda():
    """True if our kernels run for CUDA tensors. The first call, for the first CUDA tensor, may compile.

    Raises:
        ValueError: ``FASTOPT_BACKEND`` or ``FASTOPT_CUDA`` is unknown.
        RuntimeError: ``FASTOPT_BACKEND=native``, and there is no library to be had.
    """
    if cuda_kernels.backend is None and not torch.version.hip:
        module()  # which opens the library
    backend = cuda_kernels.backend or cuda_kernels.resolve()
    if backend.failure is not None:
        cuda_kernels.raise_if_requested(backend.failure)
    return backend.module is not None


def empty_cache():
    """Free the CPU memory that is kept for the next large gradient, as :func:`torch.cuda.empty_cache` does for a GPU.

    One block at most is kept: that of the large cross-entropy gradient which was freed last.

    Returns:
        Bytes that were freed.
    """
    backend = cpu_kernels.backend
    return backend.module.empty_cache() if backend is not None and backend.module is not None else 0


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
    try:
        library = cpu_kernels.build(verbose)
    except BuildError as error:
        raise RuntimeError(f"fastopt cannot be built: {error}") from error
    build_cuda(verbose)
    return library


def build_cuda(verbose=False):
    """The part of :func:`build` for CUDA: path of the library, or None where it is not enabled."""
    if not cuda_recipe.is_enabled_for(torch.version.cuda):
        return None
    try:
        return cuda_kernels.build(verbose)
    except BuildError as error:
        if isinstance(error, NoNvcc) and not flag("FASTOPT_CUDA"):
            return None
        raise RuntimeError(f"the CUDA kernels cannot be built: {error}") from error


def info():
    """Report on the kernels in use, and why these, as a dict. Loads a library that exists; never compiles one."""
    from .. import __version__

    backend = cpu_kernels.backend or cpu_kernels.existing()
    compiled = backend is not None and backend.module is not None
    instruction_set = backend.module.instruction_set() if compiled else None
    try:
        compiler = str(find_compiler())
    except BuildError as error:
        compiler = error.reason
    if backend is None:
        name, reason = "not built yet", "the first use of a kernel, or python -m fastopt build, compiles the library"
    else:
        fallback = "none" if backend.failure and requested_backend() == "native" else "reference"
        name, reason = f"native-cpu-{instruction_set}" if compiled else fallback, backend.reason
    cuda_status, cuda_library = cuda_kernels.status(backend)
    return {
        "version": __version__,
        "backend": name,
        "reason": reason,
        "library": str(backend.library) if compiled else None,
        "built_for_torch": identity.read(backend.library).get("torch") if compiled else None,
        "torch": str(torch.__version__),
        "instruction_set": instruction_set,
        "cuda": " ".join(cuda_status.split()),
        "cuda_archs": archs(cuda_library) if cuda_library else [],
        "cuda_library": str(cuda_library) if cuda_library else None,
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "cache_dir": str(cache_dir()),
    }
