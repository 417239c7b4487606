"""Finds, compiles and opens the library of CUDA kernels for the GPUs here; _native.py decides when."""

import torch

from . import _build, _build_cuda, _jit
from ._build import BuildError
from ._build_cuda import CudaLibrary

INSTALLED = _build.HERE / CudaLibrary.filename  # where installation leaves it


def gpus():
    """Compute capabilities of the GPUs that torch sees, such as (9, 0). Initializes CUDA."""
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def archs(library):
    """Architectures that are compiled into a library."""
    return _jit.read_identity(library).get("archs", [])


def installed():
    """The library that installation compiled, if it fits these sources and is whole, or None."""
    return INSTALLED if _jit.is_whole(INSTALLED, _build_cuda.identity()) else None


def find():
    """A library that serves the GPUs here, or None.

    Raises:
        BuildError: installation left none, and there is no nvcc, which names the cache's entry.
    """
    library = installed()
    if library is not None and not _build_cuda.left_out(archs(library), gpus()):
        return library
    kinds = _kind(gpus()), _kind(())
    return next(filter(None, map(_jit.cached, kinds)), None)


def compile(verbose=False):
    """Path of the library, compiled just in time for the GPUs here, or for any if there are none."""
    return _jit.compile(_kind(gpus()), verbose)


def open_with(extension, library):
    """Have the extension open a library; from then on its kernels serve CUDA tensors.

    Raises:
        BuildError: it cannot be opened, or the driver does not serve it.
    """
    try:
        extension.load_cuda(str(library))
    except RuntimeError as error:
        nvcc = _jit.read_identity(library).get("nvcc")
        remedy = f"it was compiled with nvcc {nvcc}: install a driver for that CUDA, or compile with an older nvcc; "
        remedy += f"both must be of CUDA {_build_cuda.OLDEST_CUDA} or later"
        raise BuildError(str(error).partition("\n")[0], remedy) from error


def serves(library):
    """The GPUs here, or what the library is compiled for if there are none."""
    return ", ".join([f"sm_{major}{minor}" for major, minor in gpus()] or archs(library))


def how_compiled(library):
    if library == INSTALLED:
        return "compiled at installation"
    failure = _jit.read_identity(INSTALLED).get("failure")
    return "compiled just in time" + (f": installation could not: {failure}" if failure else "")


def outlook():
    """What the first CUDA tensor will do, and the library from installation that it will find, or None.

    Raises:
        BuildError: it will do nothing, for there is no library and no nvcc.
    """
    library = installed()
    if library is not None:
        return "the first CUDA tensor opens the library from installation", library
    will = f"the first CUDA tensor, or python -m fastopt build, finds or compiles them with {_build_cuda.find_nvcc()}"
    failure = _jit.read_identity(INSTALLED).get("failure")
    return will + (f"; installation could not: {failure}" if failure else ""), None


def _kind(for_gpus):
    nvcc = _build_cuda.find_nvcc()
    return CudaLibrary(nvcc, tuple(_build_cuda.architectures(nvcc, for_gpus)))
