"""How the extension, which holds the CPU kernels, is compiled: compiler, sources and flags."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from . import commands, identity
from .commands import BuildError
from .environment import named_compiler, sanitizers

SOURCE_SUFFIXES = (".cpp", ".h")
FLAG_VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")  # read by a build from the environment
INSTALL_COMPILER = (
    "install a C++20 compiler (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "conda: conda install gxx), or name one in CXX"
)
# The program of a just-in-time build: this package is imported by itself, and the folder of fastopt is then taken off
# the path, for its modules must not shadow others.
COMPILE_HERE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from _build.recipe import compile_here; del sys.path[0]; compile_here()"
)


@dataclass(frozen=True)
class Compiler:
    """A working C++ compiler: its command and what ``--version`` prints."""

    command: str
    version: str

    @property
    def is_gcc(self):
        return "Free Software Foundation" in self.version

    def __str__(self):
        return f"{self.command} ({self.version.splitlines()[0]})"


@dataclass(frozen=True)
class CpuLibrary:
    """The extension, as a target of builds."""

    compiler: Compiler
    filename = "_C" + sysconfig.get_config_var("EXT_SUFFIX")

    def __str__(self):
        import torch

        return f"the kernels for torch {torch.__version__}"

    @staticmethod
    def identity():
        """Identity that a library must have to be loaded into this process."""
        import torch

        files = [path for path in identity.csrc().rglob("*") if path.suffix in SOURCE_SUFFIXES]
        return {
            "torch": str(torch.__version__),
            "torch_commit": torch.version.git_version,
            "torch_debug": bool(torch.version.debug),
            "cxx11_abi": torch.compiled_with_cxx11_abi(),
            "python": sysconfig.get_config_var("SOABI"),
            "sources": identity.digest(files, __file__),
            "sanitizers": sanitizers(),
        }

    def details(self):
        """Further entries of the identity file, for information."""
        return {"compiler": str(self.compiler)}

    def variant(self):
        """Further values that select the cache entry."""
        binary = os.path.realpath(shutil.which(self.compiler.command))
        return [self.compiler.version, binary, *map(os.environ.get, FLAG_VARIABLES)]

    def compile(self, work, verbose):
        """Path of the library, compiled in ``work`` by a child process, so that its output and memory are not ours."""
        if importlib.util.find_spec("setuptools") is None:
            raise BuildError("setuptools is missing", "pip install setuptools")
        path = os.pathsep.join(filter(None, sys.path))
        variables = {**build_environment(self.compiler), "PYTHONPATH": path}
        # In the folder of the build, so that no other project's setup.cfg or pyproject.toml is read.
        command = [sys.executable, "-c", COMPILE_HERE, str(identity.PACKAGE)]
        status, log = commands.run(command, variables, verbose, cwd=work)
        if status != 0:
            no_headers = ("Python.h", "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
            see_all = f"{INSTALL_COMPILER}; fastopt.build(verbose=True) shows everything"
            raise commands.failure_from_log(
                f"compiling failed with {self.compiler}", log, [no_headers], see_all
            )
        return Path(work, "lib", self.filename)


def find_compiler():
    """The compiler named in ``CXX``, else ``c++`` or ``g++`` on the path.

    Raises:
        BuildError: there is none, or it does not run.
    """
    named = named_compiler()
    command = named or next(filter(shutil.which, ("c++", "g++")), None)
    if command is None:
        raise BuildError("no C++ compiler is on the path", INSTALL_COMPILER)
    shown = f"CXX={named}" if named else command
    try:
        status, version = commands.query([command, "--version"])
    except OSError as error:
        raise BuildError(f"the C++ compiler {shown} cannot be run: {error.strerror}", INSTALL_COMPILER) from error
    if status != 0 or not version:
        raise BuildError(f"the C++ compiler {shown} is broken: --version exits with status {status}", INSTALL_COMPILER)
    return Compiler(command, version)


def compile_flags(compiler):
    """Flags of every translation unit. No -march: the kernels hold code of several levels and choose at run time."""
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags.append("-mprefer-vector-width=512")
    # at::parallel_for is a template: without OpenMP our loops would be serial. Other compilers would call a runtime of
    # their own beside torch's libgomp, so they get vector loops only.
    flags.append("-fopenmp" if compiler.is_gcc else "-fopenmp-simd")
    if compiler.is_gcc:  # or it makes a loop that zeroes a few vectors a "rep stos", which takes 10 ns to start
        flags.append("-fno-tree-loop-distribute-patterns")
    if sanitizers():
        flags += [*sanitizer_flags(), "-fno-omit-frame-pointer", "-g1", "-O1"]
    return flags


def sanitizer_flags():
    """Flags of compiling and linking with the sanitizers in ``FASTOPT_SANITIZE``."""
    # vptr checks need the type information of torch's classes, which torch keeps to itself.
    fixed = ["-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    return [f"-fsanitize={sanitizers()}", *fixed] if sanitizers() else []


def extension(name, root, compiler):
    """The extension as setuptools takes it.

    Args:
        name: full name of the module, ending in ``_C``.
        root: folder of the C++ sources; relative to setup.py ahead of time, absolute just in time.
        compiler: from :func:`find_compiler`.
    """
    from torch.utils.cpp_extension import CppExtension

    # Every .cpp of the folders, so that a new kernel needs no entry here. Objects lie in folders as their sources do.
    sources = sorted(root.rglob("*.cpp"))
    if not sources:
        raise BuildError(f"there are no C++ sources in {root}", "install fastopt anew")
    return CppExtension(
        name,
        list(map(str, sources)),
        include_dirs=[str(root.resolve())],  # ninja runs in a folder of its own
        extra_compile_args={"cxx": compile_flags(compiler)},
        extra_link_args=sanitizer_flags(),  # no -fopenmp: torch has loaded its own libgomp, and a second would fight it
    )


def build_environment(compiler):
    """Environment variables for a build: the compiler, and a path with ninja on it though no environment is active."""
    path = os.environ.get("PATH", os.defpath)
    try:
        import ninja
    except ImportError:
        if shutil.which("ninja") is None:
            raise BuildError("ninja is missing", "pip install ninja") from None
    else:
        path = f"{ninja.BIN_DIR}{os.pathsep}{path}"
    return {"CXX": compiler.command, "PATH": path}


def compile_here():
    """Compile the extension into ``lib`` in the current folder, against the torch of this interpreter."""
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension

    setup(
        name="fastopt",
        packages=[],
        py_modules=[],
        ext_modules=[extension("_C", identity.csrc(), find_compiler())],
        cmdclass={"build_ext": BuildExtension},
        script_args=["build_ext", "--build-lib", "lib", "--build-temp", "objects"],
    )
