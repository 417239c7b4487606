"""A stand-in package for the tests of building: the real build code around one tiny C++ file."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ("_build.py", "_jit.py", "_native.py")
TIMEOUT_S = 240

TINY_MODULE = """
#include "tiny/name.h"
static PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString("baseline"); }
static PyMethodDef methods[] = {{"instruction_set", instruction_set, METH_NOARGS, ""}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""

USE = """
    from fastopt import _native
    modules = [_native.module() for _ in range(3)]
    print(_native.info()["backend"])
"""


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
        for name in RECIPE:
            shutil.copy(ROOT / "fastopt" / name, self.folder)

    def start(self, code, new_session=False, **env):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTOPT_") and k != "LD_PRELOAD"}
        ours = {
            "PYTHONPATH": str(self.root),
            "PYTHONWARNINGS": "always::RuntimeWarning",
            "FASTOPT_CACHE_DIR": str(self.cache),
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


class Holding:
    """Equal to a text that holds each of some words."""

    def __init__(self, *words):
        self.words = words

    def __eq__(self, text):
        return all(word in text for word in self.words)

    def __repr__(self):
        return f"text holding {self.words}"


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def assert_one_warning(err, *words):
    assert err.count("RuntimeWarning") == 1
    for word in words:
        assert word in err
