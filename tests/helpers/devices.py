"""Devices that the tables of tests run on: the CPU, the CUDA kernels on the CPU (the shim), and a GPU.

The tests of a module that sets ``RUNS_ON`` run on each of those that is available.
"""

import contextlib
import hashlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastopt._build import commands, cuda, native, recipe
from fastopt._build.environment import cache_dir
from paths import CXX, ROOT, SHIM

CPU, SHIM_DEVICE, CUDA = "cpu", "shim", "cuda"

_current = CPU
_building = threading.Lock()


def current():
    """The device that tests run on now."""
    return _current


def is_gpu():
    """True if the CUDA kernels run, on a GPU or through the shim."""
    return _current != CPU


def params(names):
    """Parameters of the fixture ``device``; a GPU that is not there is left out."""
    marks = {CPU: [], SHIM_DEVICE: [pytest.mark.native, pytest.mark.shim], CUDA: [pytest.mark.native, pytest.mark.cuda]}
    wanted = [name for name in names if name != CUDA or torch.cuda.is_available()]
    return [pytest.param(name, marks=marks[name]) for name in wanted]


@contextlib.contextmanager
def running_on(name):
    """Tests run with this device as the default, on its CUDA kernels if it has any."""
    global _current
    if name == SHIM_DEVICE:
        if CXX is None:
            pytest.skip("the shim needs g++")
        native.module().load_host_shim(str(shim_library()))
        torch.set_default_device("cpu")  # as a GPU's tests set theirs
    elif name == CUDA:
        assert native.cuda(), native.info()["cuda"]
        torch.set_default_device("cuda")
    _current = name
    try:
        yield name
    finally:
        _current = CPU
        if name == SHIM_DEVICE:
            native.module().load_host_shim("")
        if name != CPU:
            torch.set_default_device(None)


def shim_library():
    """The library of CUDA kernels for the CPU, compiled once for these sources."""
    with _building:
        return link(compile_all(), _folder() / "shim.so")


def compile_all():
    """Object files of all kernels, by the paths of their sources below csrc/cuda, such as ``update``."""
    kernels, folder = ROOT / "csrc" / "cuda", _folder()
    sources = {path.relative_to(kernels).with_suffix("").as_posix(): path for path in sorted(kernels.rglob("*.cu"))}
    objects = {name: folder / f"{name}.o" for name in sources}
    missing = [name for name in sources if not objects[name].exists()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: compile_object(sources[name], objects[name]), missing))
    return objects


def compile_object(source, to, csrc=ROOT / "csrc"):
    """Compile one file of kernels for the CPU; moved into place whole."""
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-march=native", "-w", "-DFASTOPT_CUDA_HOST_SHIM"]
    flags += recipe.sanitizer_flags()
    to.parent.mkdir(parents=True, exist_ok=True)
    return _compile([*flags, f"-I{SHIM}", f"-I{csrc}", "-x", "c++", "-c", str(source)], to)


def link(objects, to):
    """A library of object files."""
    return to if to.exists() else _compile(["-shared", *recipe.sanitizer_flags(), *map(str, objects.values())], to)


def _compile(arguments, to):
    part = to.with_name(f"{to.name}.{os.getpid()}.part")
    status, log = commands.run([CXX, *arguments, "-o", str(part)])
    assert status == 0, "\n".join(log)[-3000:]
    os.replace(part, to)
    return to


def _folder():
    """Folder of the objects and the library, in the cache; another one for other sources or flags."""
    total = hashlib.sha256(json.dumps([cuda.CudaLibrary.identity(), recipe.sanitizer_flags()]).encode())
    total.update(Path(__file__).read_bytes())
    for path in sorted(filter(Path.is_file, SHIM.rglob("*"))):
        total.update(str(path.relative_to(SHIM)).encode() + path.read_bytes())
    return cache_dir() / f"shim-{total.hexdigest()[:16]}"
