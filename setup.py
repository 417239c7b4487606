"""The part of packaging that pyproject.toml cannot express: csrc/ goes into the package, and libraries are compiled.

FASTOPT_AOT=0 leaves them out; the build backend in _backend/ sets it where there is nothing to compile with.
FASTOPT_CUDA=1 requires the CUDA library, FASTOPT_CUDA=0 leaves it out; otherwise it is compiled if torch has CUDA and
an nvcc is found.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def import_recipes():
    """Modules of fastopt/_build, imported without fastopt around them, which is not complete yet."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "fastopt"))
    from _build import cuda, identity, recipe

    del sys.path[0]
    return recipe, cuda, identity


class BuildPy(build_py):
    """Copies csrc/ to fastopt/csrc/, so that an installed package can compile itself for another torch."""

    def _sources(self):
        root = Path("csrc")
        target = Path(self.build_lib, "fastopt", "csrc")
        return {path: target / path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()}

    def run(self):
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(Path(self.build_lib, "fastopt", "csrc"), ignore_errors=True)  # files deleted since
        for source, target in self._sources().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target), preserve_mode=False)

    def get_outputs(self, include_bytecode=True):
        copied = [] if self.editable_mode else [str(target) for target in self._sources().values()]
        return super().get_outputs(include_bytecode) + copied

    def get_output_mapping(self):
        copied = {} if self.editable_mode else {str(t): str(s) for s, t in self._sources().items()}
        return {**super().get_output_mapping(), **copied}


def compiled_extension():
    """Arguments of setup() that compile the libraries for the torch that can be imported now."""
    recipe, cuda, identity = import_recipes()
    compiler = recipe.find_compiler()
    os.environ.update(recipe.build_environment(compiler))
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Also writes the library's identity file and compiles the CUDA library."""

        def run(self):
            super().run()
            library = Path(self.get_ext_fullpath("fastopt._C"))
            target = recipe.CpuLibrary(compiler)
            identity.write(library, {**target.identity(), **target.details()})
            cuda.compile_at_installation(library.parent, Path(self.build_temp, "cuda"))

        def get_outputs(self):
            folder = Path(self.build_lib, "fastopt")
            beside = [folder / name for name in ("_C.json", "_cuda.so", "_cuda.json")]
            return [*super().get_outputs(), *(str(path) for path in beside if path.exists())]

    return {
        "ext_modules": [recipe.extension("fastopt._C", Path("csrc"), compiler)],
        "cmdclass": {"build_py": BuildPy, "build_ext": BuildExt},
    }


if os.environ.get("FASTOPT_AOT", "1") == "0":
    setup(cmdclass={"build_py": BuildPy})
else:
    setup(**compiled_extension())
