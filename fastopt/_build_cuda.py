"""How the CUDA library is built: the nvcc, the architectures and the flags.

The kernels know no torch and no Python: nvcc compiles them into a shared library of their own, which the extension
opens. So one library serves every torch, and a torch without CUDA can build it. Like _build.py, this is loaded by
setup.py without the package around it.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import _build
from ._build import BadVariable, BuildError

SOURCE_SUFFIXES = (".cu", ".cuh", ".h")
DEFAULT_ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # of a library for unknown GPUs; PTX of the first serves the others
NAMED = {  # as torch reads them, in its order: longer names first
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
NAME_ARCHS = "set TORCH_CUDA_ARCH_LIST to a list such as 8.0;9.0+PTX, or unset it"
USUAL_TOOLKIT = "/usr/local/cuda"
PIP_FOLDERS = "nvidia/*"  # in an entry of sys.path; one for each major version
OLDEST_CUDA = "12.1"  # of nvcc and driver: kernels with more than 4096 bytes of arguments need it
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CXX")  # from the environment
# Output of nvcc from which the advice about a failure is chosen.
HOST_COMPILER_TOO_NEW = r"unsupported (GNU|clang) version"
NO_HOST_COMPILER = r"Failed to preprocess host compiler"
MISSING_PART = r"fatal error: \S+: No such file|(cicc|ptxas|cudafe\+\+|fatbinary|nvlink): not found|cannot find -l"


class NoNvcc(BuildError):
    """There is no nvcc to build with."""


@dataclass(frozen=True)
class Nvcc:
    """A working nvcc: its path, what ``--version`` prints, and folders that it would not search itself."""

    command: str
    version: str
    include_dirs: tuple = ()
    library_dirs: tuple = ()

    @property
    def release(self):
        found = re.search(r"V(\d[\d.]*)", self.version)
        return found.group(1) if found else "of unknown version"

    def is_too_old(self):
        return bool(_major_minor(self.release)) and _major_minor(self.release) < _major_minor(OLDEST_CUDA)

    def __str__(self):
        return f"nvcc {self.release} ({self.command})"

    def known_architectures(self):
        """Architectures for which it compiles, ascending: 90 for sm_90."""
        listed = _output_of([self.command, "--list-gpu-code"])
        return sorted(int(number) for number in re.findall(r"\bsm_(\d+)\b", listed))


def requested():
    """The value of ``FASTOPT_CUDA``: True for 1, False for 0, None if it is not set.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get("FASTOPT_CUDA", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTOPT_CUDA must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def is_enabled_for(torch_cuda):
    """True if the kernels are to be compiled for a torch with that CUDA version (None: without CUDA)."""
    return torch_cuda is not None if requested() is None else requested()


def find_nvcc():
    """The nvcc of ``CUDA_HOME`` or ``CUDA_PATH``, on the path, in the usual place, or in pip's packages.

    Raises:
        NoNvcc: there is none, none runs, or all are too old.
    """
    unfit = None
    for command, include_dirs, library_dirs in _candidates():
        try:
            version = _output_of([command, "--version"])
        except OSError as error:
            unfit = f"{command} cannot be run: {error.strerror}"
            continue
        nvcc = Nvcc(command, version, include_dirs, library_dirs)
        if not version:
            unfit = f"{command} is broken: --version fails"
        elif nvcc.is_too_old():
            unfit = f"{nvcc} is too old: the kernels need {OLDEST_CUDA} or later"
        else:
            return nvcc
    raise NoNvcc(unfit or "nvcc not found", install_nvcc())


def install_nvcc():
    """Advice on how to get an nvcc that suits torch."""
    import torch

    version = torch.version.cuda or "13.0"
    toolkit = f"install the CUDA toolkit {version} and set CUDA_HOME to its folder"
    if int(version.partition(".")[0]) < 13:  # their packages hold no nvcc
        return toolkit
    parts = ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
    return "pip install " + " ".join(f"'nvidia-{part}=={version}.*'" for part in parts) + f", or {toolkit}"


def architectures(nvcc, gpus=()):
    """Architectures to compile for: ``sm_90`` is machine code, ``compute_90`` PTX for newer GPUs.

    Args:
        nvcc: from :func:`find_nvcc`.
        gpus: compute capabilities of the GPUs here, such as (9, 0); none for a library that serves any.

    Raises:
        BadVariable: ``TORCH_CUDA_ARCH_LIST`` cannot be read, leaves out a GPU, or names one unknown to this nvcc.
        BuildError: nvcc is too old or too new for the GPUs.
    """
    known = nvcc.known_architectures()
    if not known:
        raise BuildError(f"{nvcc} names no architecture", install_nvcc())
    listed = listed_architectures()
    if listed:
        real, virtual = _of_list(listed, known, nvcc)
    elif gpus:
        real, virtual = _for_gpus(gpus, known, nvcc)
    else:
        real = {number for number in DEFAULT_ARCHITECTURES if number in known} or {known[0]}
        virtual = {min(real)}
    archs = [f"sm_{number}" for number in sorted(real)] + [f"compute_{number}" for number in sorted(virtual)]
    missing = ", ".join(unsupported_gpus(archs, gpus))
    if missing:
        raise BadVariable(
            f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']} leaves out {missing}, which is here",
            "add it or unset TORCH_CUDA_ARCH_LIST",
        )
    return archs


def unsupported_gpus(archs, gpus):
    """GPUs that a library of these architectures does not support."""
    return [f"sm_{10 * major + minor}" for major, minor in gpus if not _supports(archs, 10 * major + minor)]


def identity():
    """Identity that a library must have to be loaded by this extension."""
    root = _build.csrc()
    extension_only = [root / folder for folder in _build.SOURCE_FOLDERS]
    files = [
        path
        for path in root.rglob("*")
        if path.suffix in SOURCE_SUFFIXES and not any(folder in path.parents for folder in extension_only)
    ]
    return {"cuda_sources": _build.digest(root, files, [_build.__file__, __file__])}


@dataclass(frozen=True)
class CudaLibrary:
    """The CUDA library, as a target of just-in-time builds."""

    nvcc: Nvcc
    archs: tuple
    filename = "_cuda.so"

    def __str__(self):
        return f"the CUDA kernels for {', '.join(self.archs)}"

    def identity(self):
        return identity()

    def details(self):
        """Further entries of the identity file, for information."""
        return {"nvcc": self.nvcc.release, "archs": list(self.archs)}

    def variant(self):
        """Further values that select the cache entry."""
        nvcc = [self.nvcc.version, os.path.realpath(self.nvcc.command)]
        return [*nvcc, list(self.archs), *map(os.environ.get, NVCC_VARIABLES)]

    def compile(self, work, verbose):
        """Path of the library, compiled in ``work``: each source to an object of its own, as many at once as fit."""
        root = _build.csrc().resolve()
        sources = sorted((root / "cuda").glob("*.cu"))
        if not sources:
            raise BuildError(f"there are no CUDA sources in {root / 'cuda'}", "install fastopt anew")
        (work / "lib").mkdir(parents=True, exist_ok=True)
        library, objects = work / "lib" / self.filename, [work / f"{path.stem}.o" for path in sources]
        n_at_once = min(_max_jobs(), len(sources))
        per_source = ["--threads", str(max(1, _max_jobs() // n_at_once))]  # architectures of one source
        with ThreadPoolExecutor(n_at_once) as pool:
            futures = [
                pool.submit(self._nvcc, [*compile_flags(), *per_source, f"-I{root}", "-c", source, "-o", to], verbose)
                for source, to in zip(sources, objects, strict=True)
            ]
        for future in futures:
            future.result()
        self._nvcc([*link_flags(), *objects, "-o", library], verbose)
        return library

    def _nvcc(self, arguments, verbose):
        options = [f"-isystem={path}" for path in self.nvcc.include_dirs]
        options += [f"-L{path}" for path in self.nvcc.library_dirs]
        named = os.environ.get("CXX")
        if named and not os.environ.get("NVCC_CCBIN"):
            options.append(f"-ccbin={named}")
        for arch in self.archs:
            options += ["-gencode", f"arch=compute_{arch.partition('_')[2]},code={arch}"]
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        status, log = _build.run([self.nvcc.command, *options, *map(str, arguments)], env, verbose)
        if status != 0:
            remedies = [
                (HOST_COMPILER_TOO_NEW, "name a C++ compiler that this nvcc takes in NVCC_CCBIN"),
                (NO_HOST_COMPILER, _build.INSTALL_COMPILER),
                (MISSING_PART, install_nvcc()),
            ]
            see_all = "python -m fastopt build --verbose shows everything; FASTOPT_CUDA=0 does without CUDA kernels"
            raise _build.failure_from_log(f"compiling the CUDA kernels failed with {self.nvcc}", log, remedies, see_all)


def compile_flags():
    """Flags of every source; ``FASTOPT_WERROR=1``, a developer's option, turns warnings into errors."""
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags.append("-Xfatbin=-compress-all")  # a tenth of the size
    if os.environ.get("FASTOPT_WERROR") == "1":
        flags += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    return flags


def link_flags():
    """Flags of the link. The runtime is static and stays inside: torch has loaded one of its own, maybe another."""
    return ["-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL,-Bsymbolic,-z,defs"]


def compile_at_installation(library, work):
    """Compile ``library`` at installation, if it is enabled for the torch that can be imported now.

    Only ``FASTOPT_CUDA=1`` makes a failure an error; otherwise the identity file records what failed.

    Args:
        library: path of the library to make.
        work: scratch folder.
    """
    import torch

    for left in (library, _build.identity_file(library)):
        left.unlink(missing_ok=True)
    if not is_enabled_for(torch.version.cuda):
        return
    try:
        nvcc = find_nvcc()
        target = CudaLibrary(nvcc, tuple(architectures(nvcc)))
        print(f"fastopt: compiling {target} with {nvcc}", file=sys.stderr)
        built_for = target.identity()
        shutil.copy(target.compile(work, verbose=True), library)
    except BuildError as error:
        if requested():
            raise
        print(f"fastopt: installed without CUDA kernels: {error}", file=sys.stderr)
        _build.write_identity(library, {}, failure=error.reason)
    else:
        _build.write_identity(library, built_for, **target.details(), sha256=_build.sha256(library))


def _candidates():
    """Each path where an nvcc is, with folders of headers and libraries that it would miss."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    in_homes = [os.path.join(home, "bin/nvcc") for home in homes if home]
    for command in [*in_homes, shutil.which("nvcc"), f"{USUAL_TOOLKIT}/bin/nvcc"]:
        if command and os.path.isfile(command):
            yield command, (), ()
    folders = [folder for entry in sys.path for folder in sorted(Path(entry or ".").glob(PIP_FOLDERS))]
    for folder in folders:
        if (folder / "bin/nvcc").is_file():
            # Another entry may hold the rest, as in an environment on top of another; and nvcc looks in lib64 only.
            parts = [folder, *(other for other in folders if other.name == folder.name and other != folder)]
            include_dirs = [part / name for part in parts for name in ("include", "include/cccl")]
            yield str(folder / "bin/nvcc"), _existing(include_dirs), _existing([part / "lib" for part in parts])


def _major_minor(release):
    """Of a version such as 13.0.88, the first two."""
    return [int(number) for number in re.findall(r"\d+", release)[:2]]


def _existing(folders):
    return tuple(str(folder) for folder in folders if folder.is_dir())


def _output_of(command):
    """Output of a program, or an empty string if it fails."""
    process = _build.spawn(command, stderr=subprocess.DEVNULL)
    output = process.communicate()[0].strip()
    return output if process.returncode == 0 else ""


def _max_jobs():
    named = os.environ.get("MAX_JOBS", "")  # as torch's builds read it
    return max(1, int(named)) if named.isascii() and named.isdigit() else os.cpu_count() or 1


def _supports(archs, gpu):
    kinds = [arch.split("_") for arch in archs]
    return any(int(number) <= gpu and (kind == "compute" or int(number) // 10 == gpu // 10) for kind, number in kinds)


def listed_architectures():
    """The architectures in ``TORCH_CUDA_ARCH_LIST``, read as torch reads it; empty for ``native`` and if it is not set.

    Returns:
        For each word in ``8.0;9.0+PTX``: the word, its number (90 for 9.0), and True if it asks for PTX. A suffix, a or
        f as in 9.0a, is ignored.

    Raises:
        BadVariable: a word cannot be read.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed in ("", "native"):
        return []
    numbers = listed
    for name, of_name in NAMED.items():
        numbers = numbers.replace(name, of_name)
    found = []
    for word in filter(None, re.split(r"[;\s]+", numbers)):
        match = re.fullmatch(r"([0-9]+)\.([0-9])[af]?(\+PTX)?", word)
        if match is None:
            raise BadVariable(f"TORCH_CUDA_ARCH_LIST holds {word!r}, which is no compute capability", NAME_ARCHS)
        found.append((word, int(match.group(1) + match.group(2)), match.group(3) is not None))
    if not found:
        raise BadVariable(f"TORCH_CUDA_ARCH_LIST={listed!r} holds no compute capability", NAME_ARCHS)
    return found


def _of_list(listed, known, nvcc):
    """Machine code and PTX for the architectures in ``TORCH_CUDA_ARCH_LIST``."""
    for word, number, _ in listed:
        if number not in known:
            raise BadVariable(f"TORCH_CUDA_ARCH_LIST holds {word}, for which {nvcc} does not compile", NAME_ARCHS)
    return {number for _, number, _ in listed}, {number for _, number, has_ptx in listed if has_ptx}


def _for_gpus(gpus, known, nvcc):
    """Machine code of each GPU that nvcc knows, and PTX for those that are newer than it."""
    real, virtual = set(), set()
    for major, minor in gpus:
        gpu = 10 * major + minor
        older = [number for number in known if number <= gpu]
        if not older:
            raise BuildError(
                f"a GPU here is sm_{gpu}, and {nvcc} compiles for sm_{known[0]} and newer",
                "hide that GPU with CUDA_VISIBLE_DEVICES, or install an older CUDA toolkit and set CUDA_HOME",
            )
        (real if gpu in known else virtual).add(older[-1])
    return real, virtual
