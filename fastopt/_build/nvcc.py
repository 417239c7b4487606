"""Finds a working nvcc, and says how to install one."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from . import commands
from .commands import BuildError

USUAL_TOOLKIT = "/usr/local/cuda"
PIP_FOLDERS = "nvidia/*"  # in an entry of sys.path; one for each major version
OLDEST_CUDA = "12.1"  # of nvcc and driver: kernels with more than 4096 bytes of arguments need it


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
        release = _major_minor(self.release)
        return bool(release) and release < _major_minor(OLDEST_CUDA)

    def __str__(self):
        return f"nvcc {self.release} ({self.command})"

    def known_architectures(self):
        """Architectures for which it compiles, ascending: 90 for sm_90."""
        status, listed = commands.query([self.command, "--list-gpu-code"])
        return sorted(int(number) for number in re.findall(r"\bsm_(\d+)\b", listed)) if status == 0 else []


def find_nvcc():
    """The nvcc of ``CUDA_HOME`` or ``CUDA_PATH``, on the path, in the usual place, or in pip's packages.

    Raises:
        NoNvcc: there is none, none runs, or all are too old.
    """
    unfit = None
    for command, include_dirs, library_dirs in _candidates():
        try:
            status, version = commands.query([command, "--version"])
        except OSError as error:
            unfit = f"{command} cannot be run: {error.strerror}"
            continue
        nvcc = Nvcc(command, version, include_dirs, library_dirs)
        if status != 0 or not version:
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


def _candidates():
    """Path of each nvcc, and folders of headers and libraries that it would not search itself."""
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
    """The first two numbers of a version such as 13.0.88; none of an unknown version."""
    return [int(number) for number in re.findall(r"\d+", release)[:2]]


def _existing(folders):
    return tuple(str(folder) for folder in folders if folder.is_dir())
