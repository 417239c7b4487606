"""Finds, compiles and opens the library of CUDA kernels.

The first CUDA tensor makes the extension open it. Where there is none, torch's own kernels run; a torch for ROCm, whose
GPU tensors are CUDA tensors too, gets no library.
"""

import torch

from . import cache, cuda, identity
from .architectures import unsupported_gpus
from .backend import Backend, Kernels
from .commands import BuildError
from .environment import flag
from .nvcc import OLDEST_CUDA, find_nvcc

INSTALLED = identity.PACKAGE / cuda.CudaLibrary.filename  # compiled by installation


class CudaKernels(Kernels):
    """The kernels for CUDA tensors, in a library that the extension opens: the backend of ``cpu_kernels`` comes first."""

    name = "CUDA kernels"
    warning = "fastopt has no kernels for CUDA tensors here, torch's own serve them: {} (FASTOPT_CUDA=0 silences this)"

    def __init__(self, cpu_kernels):
        self.cpu_kernels = cpu_kernels

    def find(self):
        """A library that supports the GPUs here, or None.

        Raises:
            BuildError: installation left none, and there is no nvcc, whose version selects the cache entry.
        """
        if _installed_matches() and not unsupported_gpus(archs(INSTALLED), gpus()):
            return INSTALLED
        targets = cuda.target(gpus()), cuda.target()
        return next(filter(None, map(cache.cached, targets)), None)

    def compile(self, verbose=False):
        return cache.compile(cuda.target(gpus()), verbose)

    def load(self, library):
        """Have the extension open a library; from then on its kernels run for CUDA tensors.

        Raises:
            BuildError: it cannot be opened, or the driver is too old for it.
        """
        extension = self.cpu_kernels.backend.module
        try:
            extension.load_cuda(str(library))
        except RuntimeError as error:
            nvcc = identity.read(library).get("nvcc")
            remedy = f"it was compiled with nvcc {nvcc}: install a driver for that CUDA, or compile with an older nvcc; "
            remedy += f"both must be of CUDA {OLDEST_CUDA} or later"
            raise BuildError(str(error).partition("\n")[0], remedy) from error
        origin = "compiled at installation" if library == INSTALLED else "compiled just in time" + _failed_installation(": ")
        return Backend(extension, origin, library)

    def unavailable(self, cpu_backend=None):
        """``cpu_backend`` is that of the CPU, if it is known and not yet chosen."""
        cpu_backend = cpu_backend or self.cpu_kernels.backend
        reference = super().unavailable()
        if reference:
            return reference
        if torch.version.hip:
            return Backend(None, "this torch is for ROCm, and the kernels are for CUDA")
        if flag("FASTOPT_CUDA") is False:
            return Backend(None, "FASTOPT_CUDA=0")
        if cpu_backend is not None and cpu_backend.module is None:  # of which the user has been warned
            return Backend(None, "the library that would open the kernels cannot be used")
        return None

    def existing(self):
        if torch.version.cuda is None and not flag("FASTOPT_CUDA"):
            return Backend(None, "this torch is built without CUDA")
        cpu_backend = self.cpu_kernels.backend
        if cpu_backend is None or not torch.cuda.is_initialized():  # which would take memory of every GPU
            return None
        return super().existing()

    def status(self, cpu_backend):
        """A line about the kernels, and their library if there is one; nothing is compiled.

        Args:
            cpu_backend: that of the CPU, or None if it would have to be compiled.
        """
        backend = self.backend or self.unavailable(cpu_backend) or self.existing()
        if backend is None:
            try:
                future, library = _first_use()
                return f"not looked at yet: {future}", library
            except BuildError as error:
                backend = Backend.failed(error)
        if backend.module is None:
            return f"none: {backend.reason}", None
        names = [f"sm_{major}{minor}" for major, minor in gpus()] or archs(backend.library)
        return f"native-cuda: {', '.join(names)}, {backend.reason}", backend.library


def gpus():
    """Compute capabilities of the GPUs that torch sees, such as (9, 0). Initializes CUDA."""
    return sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})


def archs(library):
    """Architectures that are compiled into a library."""
    return identity.read(library).get("archs", [])


def _installed_matches():
    return identity.is_intact(INSTALLED, cuda.CudaLibrary.identity())


def _first_use():
    """The effect of the first CUDA tensor, and the library from installation that it will open, or None.

    Raises:
        BuildError: there is none: no library and no nvcc.
    """
    if _installed_matches():
        return "the first CUDA tensor opens the library from installation", INSTALLED
    will = f"the first CUDA tensor, or python -m fastopt build, finds or compiles them with {find_nvcc()}"
    return will + _failed_installation("; "), None


def _failed_installation(separator):
    """Why installation did not compile the library, if it tried."""
    failure = identity.read(INSTALLED).get("failure")
    return f"{separator}installation could not: {failure}" if failure else ""
