"""The devices that tables of tests run on: the CPU, the CUDA kernels on the CPU (the shim), and a GPU.

A module that sets ``RUNS_ON`` has all its tests run on each of those that is there.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastopt import _build, _jit, _native
from paths import ROOT, TESTS

SHIM = TESTS / "cuda_shim"
CXX = shutil.which("g++")
CPU, SHIM_DEVICE, CUDA = "cpu", "shim", "cuda"

_current = CPU
_building = threading.Lock()


def current():
    """The device that tests run on now."""
    return _current


def is_gpu():
    """True if the CUDA kernels run, on a GPU or in the shim."""
    return _current != CPU


def params(names):
    """Parameters of the fixture ``device``; what is not there is left out, or skipped if that should be seen."""
    marks = {CPU: [], SHIM_DEVICE: [pytest.mark.native, pytest.mark.shim], CUDA: [pytest.mark.native, pytest.mark.cuda]}
    wanted = [name for name in names if name != CUDA or torch.cuda.is_available()]
    return [pytest.param(name, marks=marks[name]) for name in wanted]


@contextlib.contextmanager
def running_on(name):
    """Tensors that tests make go to this device's kernels."""
    global _current
    if name == SHIM_DEVICE:
        if CXX is None:
            pytest.skip("the shim needs g++")
        _native.module().load_host_shim(str(shim_library()))
        torch.set_default_device("cpu")  # as a GPU's tests set theirs
    elif name == CUDA:
        assert _native.cuda(), _native.info()["cuda"]
        torch.set_default_device("cuda")
    _current = name
    try:
        yield name
    finally:
        _current = CPU
        if name == SHIM_DEVICE:
            _native.module().load_host_shim("")
        if name != CPU:
            torch.set_default_device(None)


def shim_library():
    """The library of CUDA kernels for the CPU, compiled once for these sources."""
    with _building:
        return link(compile_all())


def sources():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_all():
    """Object files of all kernels, by name."""
    folder = _jit.cache_dir() / f"shim-{_digest()}"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [source for source in sources() if not (folder / f"{source.stem}.o").exists()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: compile_object(source, folder / f"{source.stem}.o"), missing))
    return {source.stem: folder / f"{source.stem}.o" for source in sources()}


def compile_object(source, to, csrc=ROOT / "csrc"):
    """Compile one file of kernels for the CPU; moved into place whole."""
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-march=native", "-w", "-DFASTOPT_CUDA_HOST_SHIM"]
    if _build.sanitizers():
        flags += [f"-fsanitize={_build.sanitizers()}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g1"]
    # Not a process number: several threads of one process may compile.
    part = to.with_name(f"{to.name}.{os.getpid()}.part")
    command = [CXX, *flags, f"-I{SHIM}", f"-I{csrc}", "-x", "c++", "-c", str(source), "-o", str(part)]
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    os.replace(part, to)
    return to


def link(objects, to=None):
    """A library of object files."""
    to = to or next(iter(objects.values())).with_name("shim.so")
    if not to.exists():
        part = to.with_name(f"{to.name}.{os.getpid()}.part")
        flags = [f"-fsanitize={_build.sanitizers()}"] if _build.sanitizers() else []
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        subprocess.run([CXX, "-shared", *flags, *map(str, objects.values()), "-o", str(part)], check=True, env=env)
        os.replace(part, to)
    return to


def _digest():
    parts = hashlib.sha256(_build.sanitizers().encode() + Path(__file__).read_bytes())
    for folder in (ROOT / "csrc", SHIM):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.parent.name not in ("cpu", "torch"):
                parts.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return parts.hexdigest()[:16]
