"""How the CUDA library is compiled: sources and flags.

The kernels know no torch and no Python: nvcc compiles them into a shared library of their own, which the extension
opens. So one library serves every torch, and a torch without CUDA can build it.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from . import commands, identity
from .architectures import architectures
from .commands import BuildError
from .environment import flag, max_jobs
from .nvcc import Nvcc, find_nvcc, install_nvcc
from .recipe import INSTALL_COMPILER

SOURCE_SUFFIXES = (".cu", ".cuh", ".h")
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CXX")  # from the environment
# Output of nvcc from which the advice about a failure is chosen.
HOST_COMPILER_TOO_NEW = r"unsupported (GNU|clang) version"
NO_HOST_COMPILER = r"Failed to preprocess host compiler"
MISSING_PART = r"fatal error: \S+: No such file|(cicc|ptxas|cudafe\+\+|fatbinary|nvlink): not found|cannot find -l"
# The runtime is static and stays inside: torch has loaded one of its own, maybe another.
LINK_FLAGS = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL,-Bsymbolic,-z,defs"]


@dataclass(frozen=True)
class CudaLibrary:
    """The CUDA library, as a target of builds."""

    nvcc: Nvcc
    archs: tuple
    filename = "_cuda.so"

    def __str__(self):
        return f"the CUDA kernels for {', '.join(self.archs)}"

    @staticmethod
    def identity():
        """Identity that a library must have to be opened by this extension."""
        root = identity.csrc()
        extension_only = [root / "cpu", root / "torch"]
        files = [
            path
            for path in root.rglob("*")
            if path.suffix in SOURCE_SUFFIXES and not any(folder in path.parents for folder in extension_only)
        ]
        return {"cuda_sources": identity.digest(files, __file__)}

    def details(self):
        """Further entries of the identity file, for information."""
        return {"nvcc": self.nvcc.release, "archs": list(self.archs)}

    def variant(self):
        """Further values that select the cache entry."""
        nvcc = [self.nvcc.version, os.path.realpath(self.nvcc.command)]
        return [*nvcc, list(self.archs), *map(os.environ.get, NVCC_VARIABLES)]

    def compile(self, work, verbose):
        """Path of the library, compiled in ``work``: each source to an object of its own, as many at once as fit."""
        root = identity.csrc().resolve()
        sources = sorted((root / "cuda").rglob("*.cu"))
        if not sources:
            raise BuildError(f"there are no CUDA sources in {root / 'cuda'}", "install fastopt anew")
        library = work / "lib" / self.filename
        objects = [(work / path.relative_to(root)).with_suffix(".o") for path in sources]
        for path in (library, *objects):
            path.parent.mkdir(parents=True, exist_ok=True)
        n_jobs = max_jobs() or os.cpu_count() or 1
        n_at_once = min(n_jobs, len(sources))
        per_source = ["--threads", str(max(1, n_jobs // n_at_once))]  # architectures of one source
        with ThreadPoolExecutor(n_at_once) as pool:
            futures = [
                pool.submit(self._run_nvcc, [*compile_flags(), *per_source, f"-I{root}", "-c", source, "-o", to], verbose)
                for source, to in zip(sources, objects, strict=True)
            ]
        for future in futures:
            future.result()
        self._run_nvcc([*LINK_FLAGS, *objects, "-o", library], verbose)
        return library

    def _run_nvcc(self, arguments, verbose):
        options = [f"-isystem={path}" for path in self.nvcc.include_dirs]
        options += [f"-L{path}" for path in self.nvcc.library_dirs]
        named = os.environ.get("CXX")
        if named and not os.environ.get("NVCC_CCBIN"):
            options.append(f"-ccbin={named}")
        for arch in self.archs:
            options += ["-gencode", f"arch=compute_{arch.partition('_')[2]},code={arch}"]
        status, log = commands.run([self.nvcc.command, *options, *map(str, arguments)], verbose=verbose)
        if status != 0:
            remedies = [
                (HOST_COMPILER_TOO_NEW, "name a C++ compiler that this nvcc takes in NVCC_CCBIN"),
                (NO_HOST_COMPILER, INSTALL_COMPILER),
                (MISSING_PART, install_nvcc()),
            ]
            see_all = "python -m fastopt build --verbose shows everything; FASTOPT_CUDA=0 does without CUDA kernels"
            raise commands.failure_from_log(f"compiling the CUDA kernels failed with {self.nvcc}", log, remedies, see_all)


def compile_flags():
    """Flags of every source; ``FASTOPT_WERROR=1``, a developer's option, turns warnings into errors."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags.append("-Xfatbin=-compress-all")  # a tenth of the size
    if os.environ.get("FASTOPT_WERROR") == "1":
        flags += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    return flags


def is_enabled_for(torch_cuda):
    """True if the kernels are to be compiled for a torch with that CUDA version (None: without CUDA)."""
    requested = flag("FASTOPT_CUDA")
    return torch_cuda is not None if requested is None else requested


def target(gpus=()):
    """The library for these GPUs, or for any if there are none, compiled with the nvcc that is found.

    Raises:
        BuildError: there is no nvcc, or it does not compile for a GPU.
    """
    nvcc = find_nvcc()
    return CudaLibrary(nvcc, tuple(architectures(nvcc, gpus)))


def compile_at_installation(folder, work):
    """Compile the library into ``folder``, if it is enabled for the torch that can be imported now.

    Only ``FASTOPT_CUDA=1`` makes a failure an error; otherwise the identity file records what failed.

    Args:
        folder: the package that is installed.
        work: scratch folder.
    """
    import torch

    library = folder / CudaLibrary.filename
    for old in (library, identity.file_of(library)):
        old.unlink(missing_ok=True)
    if not is_enabled_for(torch.version.cuda):
        return
    try:
        made = target()
        print(f"fastopt: compiling {made} with {made.nvcc}", file=sys.stderr)
        compiled = identity.compile_with_identity(made, work, verbose=True)
    except BuildError as error:
        if flag("FASTOPT_CUDA"):
            raise
        print(f"fastopt: installed without CUDA kernels: {error}", file=sys.stderr)
        identity.write(library, {"failure": error.reason})
    else:
        for file in (compiled, identity.file_of(compiled)):
            shutil.copy(file, folder)
