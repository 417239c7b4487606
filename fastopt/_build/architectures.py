"""Architectures of GPUs that the CUDA library is compiled for: ``TORCH_CUDA_ARCH_LIST``, the GPUs here, or a default."""

import os
import re

from .commands import BadVariable, BuildError
from .nvcc import install_nvcc

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


def architectures(nvcc, gpus=()):
    """Architectures to compile for: ``sm_90`` is machine code, ``compute_90`` PTX for newer GPUs.

    Args:
        nvcc: from :func:`nvcc.find_nvcc`.
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


def _supports(archs, gpu):
    kinds = [arch.split("_") for arch in archs]
    return any(int(number) <= gpu and (kind == "compute" or int(number) // 10 == gpu // 10) for kind, number in kinds)
