"""A stand-in package for the tests of building: the real build code around one tiny C++ file."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

from paths import ROOT

TIMEOUT_S = 240

TINY_MODULE = """
#include "tiny/name.h"
#include <dlfcn.h>
static PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString("baseline"); }
static PyObject* load_cuda(PyObject*, PyObject* path) {
  void* library = dlopen(PyUnicode_AsUTF8(path), RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr && dlsym(library, "fastopt_cuda_library") != nullptr) Py_RETURN_NONE;
  return PyErr_Format(PyExc_RuntimeError, "not a library of kernels");
}
static PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, ""}, {"load_cuda", load_cuda, METH_O, ""}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""

USE = """
    from fastopt._build import native
    modules = [native.module() for _ in range(3)]
    print(native.info()["backend"])
"""


USE_CUDA = """
    from fastopt._build import native
    print({native.cuda() for _ in range(3)})
"""

CUDA_INFO = """
    from fastopt._build import native
    print(native.info()["cuda"])
"""

# Prints what nvcc prints about itself, logs its arguments, and compiles with c++.
FAKE_NVCC = """
case "$1" in
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit ;;
  --list-gpu-code) for n in 75 80 86 89 90 100 103 120; do echo sm_$n; done; exit ;;
esac
PATH={path}
echo "$@" >> {log}
for argument; do
  case "$argument" in *.cu) source=$argument ;; *.o) objects="$objects $argument" ;; *.so) library=$argument ;; esac
done
if [ "$library" ]; then exec c++ -shared -o "$library" $objects; fi
exec c++ -fPIC -x c++ -c "$source" -o $objects
"""


DAMAGES = ("truncated", "garbage", "no library", "no identity", "bad identity")


def do_damage(damage, library, identity):
    """Damage a cached library or its identity file."""
    if damage == "truncated":
        os.truncate(library, library.stat().st_size // 2)
    elif damage == "garbage":
        library.write_bytes(b"not a library")
    elif damage == "no library":
        library.unlink()
    elif damage == "no identity":
        identity.unlink()
    else:
        identity.write_text("[")


class Package:
    """A stand-in checkout of fastopt with a cache of its own; ``run`` gives it a fresh process."""

    def __init__(self, root):
        self.root = root
        self.folder = root / "fastopt"
        self.cache = root / "cache"
        self.folder.mkdir(parents=True)
        (root / "csrc/torch").mkdir(parents=True)
        (root / "csrc/tiny").mkdir()
        (root / "csrc/tiny/name.h").write_text("#include <Python.h>\n")
        (root / "csrc/torch/module.cpp").write_text(TINY_MODULE)
        (self.folder / "__init__.py").write_text('__version__ = "0.1.0"\n')
        shutil.copytree(ROOT / "fastopt/_build", self.folder / "_build", ignore=shutil.ignore_patterns("__pycache__"))

    def add_cuda(self):
        """Give it CUDA sources, and hide every nvcc of this machine from it but by PATH and CUDA_HOME."""
        (self.root / "csrc/cuda").mkdir()
        (self.root / "csrc/rules").mkdir()
        (self.root / "csrc/cuda/empty.cu").write_text("// an object of its own\n")
        (self.root / "csrc/cuda/library.cu").write_text('extern "C" const void* fastopt_cuda_library() { return 0; }\n')
        (self.root / "bin").mkdir()
        (self.root / "bin/c++").symlink_to(shutil.which("c++"))
        finder = self.folder / "_build/nvcc.py"
        text = finder.read_text()
        for constant, hidden in (('"/usr/local/cuda"', str(self.root / "usual")), ('"nvidia/*"', "of_pip/*")):
            assert text.count(constant) == 1
            text = text.replace(constant, repr(hidden))
        finder.write_text(text)

    def add_nvcc(self, folder="bin", body=FAKE_NVCC):
        """Put a fake nvcc into a folder of the checkout; gives its path."""
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        log = self.root / "nvcc.log"
        return script(self.root / folder / "nvcc", body.format(path=os.environ["PATH"], log=log))

    def run_cuda(self, code=USE_CUDA, gpus=((9, 0),), torch_cuda="13.0", torch_hip=None, **env):
        """As ``run``, on a machine with those GPUs, a torch with that CUDA or ROCm, and no nvcc but those added."""
        pretend = f"""
            import torch
            torch.version.cuda, torch.version.hip = {torch_cuda!r}, {torch_hip!r}
            torch.cuda.device_count = {gpus!r}.__len__
            torch.cuda.get_device_capability = {gpus!r}.__getitem__
        """
        env = {"PATH": str(self.root / "bin"), "FASTOPT_CUDA": "", **env}
        return self.run(textwrap.dedent(pretend) + textwrap.dedent(code), **env)

    def nvcc_calls(self):
        """Arguments of each call of a fake nvcc that was to compile."""
        log = self.root / "nvcc.log"
        return log.read_text().splitlines() if log.exists() else []

    def cuda_library(self):
        (library,) = self.cache.glob("*/_cuda.so")
        return library

    def start(self, code, new_session=False, **env):
        not_ours = re.compile("FASTOPT_|NVCC_|CUDA_|TORCH_CUDA_ARCH_LIST$|LD_PRELOAD$")
        inherited = {name: value for name, value in os.environ.items() if not not_ours.match(name)}
        ours = {
            "PYTHONPATH": str(self.root),
            "PYTHONWARNINGS": "always::RuntimeWarning",
            "FASTOPT_CACHE_DIR": str(self.cache),
            "FASTOPT_CUDA": "0",
        }
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**inherited, **ours, **env},
            cwd=self.root.parent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=new_session,
        )

    def run(self, code=USE, **env):
        """Standard output and error of ``code`` in a fresh process."""
        return self.finish(self.start(code, **env))

    @staticmethod
    def finish(process):
        out, err = process.communicate(timeout=TIMEOUT_S)
        return out.strip(), err

    def entry(self):
        (entry,) = self.cache.iterdir()
        return entry

    def library(self):
        (library,) = self.entry().glob("_C*.so")
        return library


class Containing:
    """Equal to any text that contains all of the words."""

    def __init__(self, *words):
        self.words = words

    def __eq__(self, text):
        return all(word in text for word in self.words)

    def __repr__(self):
        return f"text containing {self.words}"


CUDA_COMPILED = Containing("compiling the CUDA kernels", "compiled in")


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def assert_one_warning(err, *words):
    assert err.count("RuntimeWarning") == 1
    for word in words:
        assert word in err
