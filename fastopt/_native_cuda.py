"""Finds, compiles and opens the library of CUDA kernels for the GPUs here; _native.py decides when."""

import torch

from . import _build, _build_cuda, _jit
from ._build import BuildError
from ._build_cuda import CudaLibrary

INSTALLED = _build.HERE / CudaLibrary.filename  # compiled by installation


def gpus():
    """Compute capabilities of the GPUs that torch sees, such as (9, 0). Initializes CUDA."""
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def archs(library):
    """Architectures that are compiled into a library."""
    return _jit.read_identity(library).get("archs", [])


def installed():
    """The library that installation compiled, if it matches these sources and is intact, or None."""
    return INSTALLED if _jit.is_intact(INSTALLED, _build_cuda.identity()) else None


def find():
    """A library that supports the GPUs here, or None.

    Raises:
        BuildError: installation left none, and there is no nvcc, whose version selects the cache entry.
    """
    library = installed()
    if library is not None and not _build_cuda.unsupported_gpus(archs(library), gpus()):
        return library
    targets = _target(gpus()), _target(())
    return next(filter(None, map(_jit.cached, targets)), None)


def compile(verbose=False):
    """Path of the library, compiled just in time for the GPUs here, or for any if there are none."""
    return _jit.compile(_target(gpus()), verbose)


def open_with(extension, library):
    """Have the extension open a library; from then on its kernels run for CUDA tensors.

    Raises:
        BuildError: it cannot be opened, or the driver is too old for it.
    """
    try:
        extension.load_cuda(str(library))
    except RuntimeError as error:
        nvcc = _jit.read_identity(library).get("nvcc")
        remedy = f"it was compiled with nvcc {nvcc}: install a driver for that CUDA, or compile with an older nvcc; "
        remedy += f"both must be of CUDA {_build_cuda.OLDEST_CUDA} or later"
        raise BuildError(str(error).partition("\n")[0], remedy) from error


def names_of_gpus(library):
    """The GPUs here, such as sm_90, or the library's architectures if there are none."""
    return ", ".join([f"sm_{major}{minor}" for major, minor in gpus()] or archs(library))


def how_compiled(library):
    if library == INSTALLED:
        return "compiled at installation"
    failure = _jit.read_identity(INSTALLED).get("failure")
    return "compiled just in time" + (f": installation could not: {failure}" if failure else "")


def status():
    """What happens at the first CUDA tensor, and the library from installation that it will open, or None.

    Raises:
        BuildError: nothing happens, for there is no library and no nvcc.
    """
    library = installed()
    if library is not None:
        return "the first CUDA tensor opens the library from installation", library
    future = f"the first CUDA tensor, or python -m fastopt build, finds or compiles them with {_build_cuda.find_nvcc()}"
    failure = _jit.read_identity(INSTALLED).get("failure")
    return future + (f"; installation could not: {failure}" if failure else ""), None


def _target(for_gpus):
    nvcc = _build_cuda.find_nvcc()
    return CudaLibrary(nvcc, tuple(_build_cuda.architectures(nvcc, for_gpus)))
