"""How the extension is built: its sources, its flags and its identity, ahead of time and just in time alike.

setup.py loads this file without the package around it, and a just-in-time build runs it as a program, so it imports
nothing of fastopt, and torch only inside functions. The CUDA library's build uses parts of it.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE_FOLDERS = ("cpu", "torch")  # csrc/cpu knows no torch header, csrc/torch is the glue
SOURCE_SUFFIXES = (".cpp", ".h")
FLAG_VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")  # read by a build from the environment

INSTALL_COMPILER = (
    "install a C++20 compiler (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
    "conda: conda install gxx), or name one in CXX"
)
USE_WRITABLE_CACHE = "free some space, or set FASTOPT_CACHE_DIR to a directory that can be written"
ERROR_LINE = re.compile(
    r"\berror *: |#error|\bfatal *: |\bundefined reference\b|\bcannot find\b|: not found$|: No such file or directory$"
    r"|\bNo space left|^FAILED: |ModuleNotFoundError"
)

# Held while a program is started, and by a thread that forks: a child forked in between would keep open the pipe by
# which the start is reported, and the parent would wait for it.
spawn_lock = threading.RLock()


class BuildError(Exception):
    """The library cannot be built here: ``reason`` is the cause, ``remedy`` the advice to the user."""

    def __init__(self, reason, remedy):
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class BadVariable(BuildError):
    """An environment variable has a value that cannot be used."""


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


def spawn(command, env=None, stderr=subprocess.STDOUT):
    """Start a program with no input and its output in a pipe."""
    with spawn_lock:
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
        )


def run(command, env=None, verbose=False):
    """Exit status of a program and the lines it printed, which ``verbose`` passes on to stderr."""
    log = []
    with spawn(command, env=env) as process:
        for line in process.stdout:
            log.append(line.rstrip())
            if verbose:
                print(line, end="", file=sys.stderr)
    return process.returncode, log


def failure_from_log(failed, log, remedies, otherwise):
    """The error to raise for a build that failed, from what it printed.

    Args:
        failed: the step that failed.
        log: lines of its output.
        remedies: pairs of a pattern to look for in the lines and the advice if it is found.
        otherwise: the advice if none is found.
    """
    errors = [line for line in log if ERROR_LINE.search(line)] or log[-4:]
    reason = "\n    ".join([f"{failed}:", *(line[:200] for line in errors[:6])])
    remedies = [("No space left on device", USE_WRITABLE_CACHE), *remedies]
    found = (remedy for pattern, remedy in remedies if any(re.search(pattern, line) for line in log))
    return BuildError(reason, next(found, otherwise))


def named_compiler():
    """The compiler named in ``CXX``, or an empty string.

    Raises:
        BadVariable: it holds more than the name of a program.
    """
    named = os.environ.get("CXX", "")
    if " " in named and shutil.which(named) is None:  # torch would quote it as one word
        raise BadVariable(
            f"CXX must name one program, got {named!r}", "put flags into CFLAGS; torch finds ccache itself"
        )
    return named


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
        process = spawn([command, "--version"], stderr=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"the C++ compiler {shown} cannot be run: {error.strerror}", INSTALL_COMPILER) from error
    version = process.communicate()[0].strip()
    if process.returncode != 0 or not version:
        raise BuildError(
            f"the C++ compiler {shown} is broken: --version exits with status {process.returncode}", INSTALL_COMPILER
        )
    return Compiler(command, version)


def csrc():
    """Folder of the C++ sources: inside an installed package, beside the package in a checkout."""
    inside = HERE / "csrc"
    return inside if inside.is_dir() else HERE.parent / "csrc"


def sources(root):
    """Translation units of the extension: every .cpp of the folders, so a new kernel needs no entry here."""
    return sorted(path for folder in SOURCE_FOLDERS for path in (root / folder).glob("*.cpp"))


def digest(root, files, recipes):
    """Hash of all that a build reads from fastopt: ``files`` below ``root``, and the Python files with its flags."""
    total = hashlib.sha256()
    for recipe in recipes:
        total.update(Path(recipe).read_bytes())
    for path in sorted(files):
        total.update(f"\n{path.relative_to(root)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def sanitizers():
    """Sanitizers asked for, as -fsanitize takes them; a developer's option."""
    return os.environ.get("FASTOPT_SANITIZE", "")


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
        # vptr checks need the type information of torch's classes, which torch keeps to itself.
        flags += [f"-fsanitize={sanitizers()}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        flags += ["-fno-omit-frame-pointer", "-g1", "-O1"]
    return flags


def link_flags():
    """Flags of the link. No -fopenmp: torch has loaded its own libgomp, and a second runtime would fight it."""
    return [f"-fsanitize={sanitizers()}"] if sanitizers() else []


def extension(name, root, compiler):
    """The extension as setuptools takes it.

    Args:
        name: full name of the module, ending in ``_C``.
        root: folder of the C++ sources; relative to setup.py ahead of time, absolute just in time.
        compiler: from :func:`find_compiler`.
    """
    from torch.utils.cpp_extension import CppExtension

    files = [str(path) for path in sources(root)]
    if not files:
        raise BuildError(f"there are no C++ sources in {root}", "install fastopt anew")
    return CppExtension(
        name,
        files,
        include_dirs=[str(root.resolve())],  # ninja runs in a folder of its own
        extra_compile_args={"cxx": compile_flags(compiler)},
        extra_link_args=link_flags(),
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


def identity():
    """Identity that a library must have to be loaded into this process."""
    import torch

    files = [path for path in csrc().rglob("*") if path.suffix in SOURCE_SUFFIXES]
    return {
        "torch": str(torch.__version__),
        "torch_commit": torch.version.git_version,
        "torch_debug": bool(torch.version.debug),
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "python": sysconfig.get_config_var("SOABI"),
        "sources": digest(csrc(), files, [__file__]),
        "sanitizers": sanitizers(),
    }


def identity_file(library):
    """Path of a library's identity file, beside it: ``_C.json`` for ``_C.cpython-311-x86_64-linux-gnu.so``."""
    return library.with_name(library.name.partition(".")[0] + ".json")


def write_identity(library, built_for, **more):
    """Write a library's identity file."""
    identity_file(library).write_text(json.dumps({**built_for, **more}, indent=1) + "\n", encoding="utf-8")


def sha256(path):
    """Checksum of a file, or None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


@dataclass(frozen=True)
class CpuLibrary:
    """The extension, as a target of just-in-time builds."""

    compiler: Compiler
    filename = "_C" + sysconfig.get_config_var("EXT_SUFFIX")

    def __str__(self):
        import torch

        return f"the kernels for torch {torch.__version__}"

    def identity(self):
        return identity()

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
        env = {**os.environ, **build_environment(self.compiler), "PYTHONPATH": path}
        env.pop("LD_PRELOAD", None)  # a sanitizer's runtime is for the tests, not for the compiler
        status, log = run([sys.executable, __file__, str(work)], env, verbose)
        if status != 0:
            no_headers = ("Python.h", "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
            see_all = f"{INSTALL_COMPILER}; fastopt.build(verbose=True) shows everything"
            raise failure_from_log(f"compiling failed with {self.compiler}", log, [no_headers], see_all)
        return Path(work, "lib", self.filename)


def compile_into(directory):
    """Compile the extension into ``directory``/lib against the torch of this interpreter."""
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension

    os.chdir(directory)  # so that no other project's setup.cfg or pyproject.toml is read
    setup(
        name="fastopt",
        packages=[],
        py_modules=[],
        ext_modules=[extension("_C", csrc(), find_compiler())],
        cmdclass={"build_ext": BuildExtension},
        script_args=["build_ext", "--build-lib", "lib", "--build-temp", "objects"],
    )


if __name__ == "__main__":
    sys.path.remove(str(HERE))  # put there for the script; its modules must not shadow others
    compile_into(sys.argv[1])
