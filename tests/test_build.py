"""Building, caching and packaging. Each test runs a stand-in package: the real build code around one tiny C++ file."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path / "checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A package whose library has been compiled just in time; copied, never changed."""
    package = Package(tmp_path_factory.mktemp("built") / "checkout")
    assert package.run() == ("native-cpu-baseline", Holding("compiling", "compiled in"))
    return package


@pytest.fixture
def copied(built, tmp_path):
    """A package whose cache holds the compiled library."""
    package = Package(tmp_path / "checkout")
    shutil.copytree(built.cache, package.cache)
    return package


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


# First use


def test_import_compiles_nothing_and_prints_nothing(package, tmp_path):
    assert package.run("import fastopt", PYTHONPATH=str(ROOT), CXX=str(tmp_path / "none")) == ("", "")
    assert not package.cache.exists()


def test_first_use_compiles_and_says_so_once(package):
    out, err = package.run()
    assert out == "native-cpu-baseline"
    assert [line.split()[:2] for line in err.splitlines()] == [["fastopt:", "compiling"], ["fastopt:", "compiled"]]
    assert package.run() == ("native-cpu-baseline", "")


def test_info_reports_without_compiling(package):
    out, err = package.run("from fastopt import _native; print(_native.info())")
    assert "'backend': 'not built yet'" in out
    assert err == ""
    assert not package.cache.exists()


def test_info_loads_a_library_that_is_there(copied):
    out, err = copied.run("from fastopt import _native; print(_native.info())")
    assert "'backend': 'native-cpu-baseline'" in out
    assert str(copied.cache) in out
    assert err == ""


def test_build_compiles_and_gives_the_path_of_the_library(package):
    build = "from fastopt import _native; print(_native.build())"
    out, err = package.run(build)
    assert out == str(package.library())
    assert "compiled in" in err
    assert package.run(build) == (str(package.library()), "")


def test_changed_sources_are_compiled_anew(copied):
    header = copied.root / "csrc/common.h"
    header.write_text("// a header counts as much as a source\n")
    assert copied.run() == ("native-cpu-baseline", Holding("compiling", "compiled in"))


# Processes


def test_racing_processes_compile_once(package):
    results = [package.finish(process) for process in [package.start(USE), package.start(USE), package.start(USE)]]
    assert [out for out, _ in results] == ["native-cpu-baseline"] * 3
    assert sum("compiled in" in err for _, err in results) == 1


def test_killed_build_is_recovered(package, tmp_path):
    hang = tmp_path / "hang"
    hang.touch()
    cxx = script(
        tmp_path / "cxx", f'case "$*" in *" -c "*) while [ -e {hang} ]; do sleep 0.1; done ;; esac\nexec c++ "$@"'
    )
    process = package.start(USE, new_session=True, CXX=cxx)
    deadline = time.monotonic() + TIMEOUT_S
    while not list(package.cache.glob("*/build-*/objects/build.ninja")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(package.entry().glob("build-*"))
    assert (package.entry() / "lock").exists()
    hang.unlink()
    assert package.run(CXX=cxx)[0] == "native-cpu-baseline"
    assert not list(package.entry().glob("build-*"))


def test_forks_during_a_build_do_not_deadlock(package):
    out, err = package.run(
        """
        import os, sys, threading, time
        from fastopt import _native
        builder = threading.Thread(target=_native.module)
        builder.start()
        while not _native._jit._lock_files: time.sleep(0.01)
        children = []
        for _ in range(20):
            children.append(os.fork())
            if children[-1] == 0:
                os._exit(0 if _native.module() is not None else 1)
            time.sleep(0.01)
        builder.join()
        print({os.waitpid(child, 0)[1] for child in children}, _native.module() is not None)
        """
    )
    assert out == "{0} True"
    assert err.count("compiled in") == 1


# The cache


@pytest.mark.parametrize("damage", ["truncated", "garbage", "no library", "no identity", "bad identity"])
def test_damaged_cache_is_compiled_anew(copied, damage):
    library, identity = copied.library(), copied.entry() / "_C.json"
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
    assert copied.run() == ("native-cpu-baseline", Holding("compiled in"))
    assert copied.run() == ("native-cpu-baseline", "")


def test_cache_that_cannot_be_written_leads_to_the_reference_path(package):
    package.cache.write_text("a file where the directory should be")
    out, err = package.run()
    assert out == "reference"
    assert_one_warning(err, str(package.cache), "FASTOPT_CACHE_DIR")


def test_cache_that_cannot_be_written_still_serves_what_it_holds(copied):
    for path in (copied.entry() / "lock", copied.library(), copied.entry() / "_C.json"):
        path.chmod(0o444)
    blocked = "import builtins, os; os.makedirs = os.mkdir = None\n"
    assert copied.run(blocked + textwrap.dedent(USE)) == ("native-cpu-baseline", "")


def test_full_disk_leads_to_the_reference_path(package):
    package.cache.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", package.cache], stderr=subprocess.DEVNULL
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        out, err = package.run()
    finally:
        subprocess.run(["umount", package.cache], check=True)
    assert out == "reference"
    assert_one_warning(err, "No space left on device", "FASTOPT_CACHE_DIR")


def test_compiler_on_a_full_disk_leads_to_the_reference_path(package, tmp_path):
    says = "echo 'cc1plus: fatal error: error writing to x.o: No space left on device' >&2"
    cxx = script(tmp_path / "cxx", f'[ "$1" = --version ] && exec c++ --version\n{says}\nexit 1')
    out, err = package.run(CXX=cxx)
    assert out == "reference"
    assert_one_warning(err, "No space left on device", "FASTOPT_CACHE_DIR")


# The compiler


def test_missing_compiler_leads_to_the_reference_path(package):
    out, err = package.run(CXX="/nonexistent/c++")
    assert out == "reference"
    assert_one_warning(err, "/nonexistent/c++", "No such file", "apt-get install g++")


def test_no_compiler_on_the_path_leads_to_the_reference_path(package, tmp_path):
    out, err = package.run(PATH=str(tmp_path), CXX="")
    assert out == "reference"
    assert_one_warning(err, "no C++ compiler is on the path", "apt-get install g++")


def test_compiler_with_arguments_leads_to_the_reference_path(package):
    out, err = package.run(CXX="g++ -pipe")
    assert out == "reference"
    assert_one_warning(err, "CXX must name one program, got 'g++ -pipe'", "CFLAGS")


@pytest.mark.parametrize("body", ["exit 1", "echo g++; exit 1", '[ "$1" = --version ] && exec c++ --version\nexit 1'])
def test_broken_compiler_leads_to_the_reference_path(package, tmp_path, body):
    cxx = script(tmp_path / "broken-cxx", body)
    out, err = package.run(CXX=cxx)
    assert out == "reference"
    assert_one_warning(err, cxx, "apt-get install g++")


def test_compile_error_is_quoted_in_the_warning(package):
    (package.root / "csrc/torch/module.cpp").write_text("int f() { return undeclared_name; }\n")
    out, err = package.run()
    assert out == "reference"
    assert_one_warning(err, "error:", "undeclared_name")
    assert len(err.splitlines()) < 15


def test_missing_ninja_leads_to_the_reference_path(package, tmp_path):
    (package.root / "ninja.py").write_text("raise ImportError\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/c++").symlink_to(shutil.which("c++"))
    out, err = package.run(PATH=str(tmp_path / "bin"))
    assert out == "reference"
    assert_one_warning(err, "pip install ninja")


def test_build_raises_where_it_cannot(package):
    _, err = package.run("from fastopt import _native; _native.build()", CXX="/nonexistent/c++")
    assert "RuntimeError: fastopt cannot be built: the C++ compiler CXX=/nonexistent/c++" in err


# FASTOPT_BACKEND


def test_reference_backend_compiles_nothing(package):
    assert package.run(FASTOPT_BACKEND="reference") == ("reference", "")
    assert not package.cache.exists()


def test_native_backend_raises_with_the_reason(package):
    _, err = package.run(FASTOPT_BACKEND="native", CXX="/nonexistent/c++")
    assert "RuntimeError: FASTOPT_BACKEND=native" in err
    assert "CXX=/nonexistent/c++ cannot be run" in err
    assert "apt-get install g++" in err
    assert "RuntimeWarning" not in err


def test_native_backend_serves_the_library(copied):
    assert copied.run(FASTOPT_BACKEND="native") == ("native-cpu-baseline", "")


def test_unknown_backend_is_named(package):
    _, err = package.run(FASTOPT_BACKEND="cuda")
    assert "ValueError: FASTOPT_BACKEND must be one of auto, native, reference, got 'cuda'" in err


# The library compiled at installation


def install(package):
    """Move the library from the cache to where installation leaves it."""
    for path in (package.library(), package.entry() / "_C.json"):
        shutil.copy(path, package.folder)
    shutil.rmtree(package.cache)


def test_library_from_installation_serves_without_a_compiler(copied):
    install(copied)
    assert copied.run(CXX="/nonexistent/c++") == ("native-cpu-baseline", "")


@pytest.mark.parametrize("field", ["torch", "python"])
def test_library_from_installation_for_another_torch_or_python_is_not_loaded(copied, field):
    install(copied)
    identity = copied.folder / "_C.json"
    identity.write_text(identity.read_text().replace(f'"{field}": "', f'"{field}": "not-'))
    out, err = copied.run(textwrap.dedent(USE) + 'print(_native.info()["reason"])')
    assert out.splitlines() == [
        "native-cpu-baseline",
        f"compiled just in time: the library from installation differs in {field}",
    ]
    assert "compiled in" in err


# Packaging


@pytest.fixture
def project(package):
    """The stand-in package with the real project files around it, ready for the build backend."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, package.root)
    shutil.copytree(ROOT / "_backend", package.root / "_backend")
    (package.root / "README.md").write_text("fastopt\n")
    return package


def call_backend(package, hook, **env):
    """Run one hook of the build backend; gives the path of what it made and what it said on stderr."""
    code = f"""
        import contextlib, os, sys
        os.chdir({str(package.root)!r})
        sys.path.insert(0, "_backend")
        import fastopt_backend
        with contextlib.redirect_stdout(sys.stderr):
            name = fastopt_backend.{hook}("dist")
        print(name)
    """
    out, err = package.run(code, **env)
    assert out, err
    return package.root / "dist" / out.splitlines()[-1], err


def csrc_files(root):
    return {path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*") if path.is_file()}


def test_wheel_is_compiled_beside_torch(project):
    wheel, _ = call_backend(project, "build_wheel")
    assert "none-any" not in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastopt/_C.json", "fastopt/csrc/torch/module.cpp"} <= names
    assert any(name.startswith("fastopt/_C") and name.endswith(".so") for name in names)


def test_installed_wheel_serves_what_was_compiled(project, tmp_path):
    wheel, _ = call_backend(project, "build_wheel")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert project.run(PYTHONPATH=str(tmp_path / "site"), CXX="/nonexistent/c++") == ("native-cpu-baseline", "")


def test_installed_wheel_compiles_itself_from_the_sources_it_carries(project, tmp_path):
    wheel, _ = call_backend(project, "build_wheel", FASTOPT_AOT="0")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    out, err = project.run(PYTHONPATH=str(tmp_path / "site"))
    assert out == "native-cpu-baseline"
    assert "compiled in" in err


def test_wheel_without_a_compiler_holds_sources_only(project):
    wheel, err = call_backend(project, "build_wheel", CXX="/nonexistent/c++")
    assert wheel.name.endswith("py3-none-any.whl")
    assert "CXX=/nonexistent/c++ cannot be run" in err
    assert "First use compiles it just in time" in err


def test_editable_install_compiles_in_place(project):
    call_backend(project, "build_editable")
    assert project.run(CXX="/nonexistent/c++") == ("native-cpu-baseline", "")


def test_wheel_and_sdist_carry_all_of_csrc(project):
    shutil.rmtree(project.root / "csrc")
    shutil.copytree(ROOT / "csrc", project.root / "csrc")
    wheel, _ = call_backend(project, "build_wheel", FASTOPT_AOT="0")
    sdist, _ = call_backend(project, "build_sdist")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with contextlib.closing(tarfile.open(sdist)) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"fastopt/{name}" for name in csrc_files(ROOT)} <= in_wheel
    assert csrc_files(ROOT) | {"setup.py", "LICENSE", "_backend/fastopt_backend.py"} <= in_sdist


def test_no_requirement_makes_pip_replace_torch(project):
    wheel, _ = call_backend(project, "build_wheel", FASTOPT_AOT="0")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    requires = [
        line for line in archive.read(metadata).decode().splitlines() if line.startswith("Requires-Dist: torch")
    ]
    assert requires == ["Requires-Dist: torch>=2.11"]
