"""Building and caching, with a stand-in package."""

import importlib
import os
import shutil
import signal
import subprocess
import textwrap
import time

import pytest

import fastopt
from stand_in import DAMAGES, ROOT, TIMEOUT_S, USE, Containing, assert_one_warning, do_damage, script

pytestmark = pytest.mark.slow

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
    out, err = package.run("from fastopt._build import native; print(native.info())")
    assert "'backend': 'not built yet'" in out
    assert err == ""
    assert not package.cache.exists()


def test_info_loads_a_library_that_is_there(copied):
    out, err = copied.run("from fastopt._build import native; print(native.info())")
    assert "'backend': 'native-cpu-baseline'" in out
    assert str(copied.cache) in out
    assert err == ""


def test_build_compiles_and_gives_the_path_of_the_library(package):
    build = "from fastopt._build import native; print(native.build())"
    out, err = package.run(build)
    assert out == str(package.library())
    assert "compiled in" in err
    assert package.run(build) == (str(package.library()), "")


def test_changed_sources_are_compiled_anew(copied):
    header = copied.root / "csrc/common.h"
    header.write_text("// a header counts as much as a source\n")
    assert copied.run() == ("native-cpu-baseline", Containing("compiling", "compiled in"))


def test_sources_in_several_folders_may_have_one_name(package):
    module = package.root / "csrc/torch/module.cpp"
    module.write_text("const char* name();\n" + module.read_text().replace('"baseline"', "name()"))
    (package.root / "csrc/torch/deep").mkdir()
    (package.root / "csrc/torch/deep/module.cpp").write_text('const char* name() { return "deep"; }\n')
    assert package.run() == ("native-cpu-deep", Containing("compiled in"))


def test_build_is_a_function_although_a_folder_of_modules_is_about_it():
    assert fastopt._build.native.build is fastopt.build
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fastopt.build")
    assert callable(fastopt.build)


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
        from fastopt._build import cache, native
        builder = threading.Thread(target=native.module)
        builder.start()
        while not cache._lock_files: time.sleep(0.01)
        children = []
        for _ in range(20):
            children.append(os.fork())
            if children[-1] == 0:
                os._exit(0 if native.module() is not None else 1)
            time.sleep(0.01)
        builder.join()
        print({os.waitpid(child, 0)[1] for child in children}, native.module() is not None)
        """
    )
    assert out == "{0} True"
    assert err.count("compiled in") == 1


# The cache


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_compiled_anew(copied, damage):
    do_damage(damage, copied.library(), copied.entry() / "_C.json")
    assert copied.run() == ("native-cpu-baseline", Containing("compiled in"))
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
    _, err = package.run("from fastopt._build import native; native.build()", CXX="/nonexistent/c++")
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
