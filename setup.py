"""What pyproject.toml cannot say: csrc/ travels inside the package, and the extension is compiled where torch is.

FASTOPT_AOT=0 leaves the extension out; the build backend in _backend/ sets it where there is nothing to compile with.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def load_recipe():
    """fastopt/_build.py, by path: the package around it cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location("fastopt_build_recipe", Path(__file__).parent / "fastopt/_build.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    return recipe


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
    """Arguments of setup() that compile fastopt._C against the torch that can be imported now."""
    recipe = load_recipe()
    compiler = recipe.find_compiler()
    os.environ.update(recipe.build_environment(compiler))
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Leaves beside the library what it was built for."""

        def _identity_file(self):
            return Path(self.get_ext_fullpath("fastopt._C")).with_name(recipe.IDENTITY)

        def run(self):
            super().run()
            recipe.write_identity(self._identity_file(), recipe.identity(), compiler)

        def get_outputs(self):
            return [*super().get_outputs(), str(Path(self.build_lib, "fastopt", recipe.IDENTITY))]

    return {
        "ext_modules": [recipe.extension("fastopt._C", Path("csrc"), compiler)],
        "cmdclass": {"build_py": BuildPy, "build_ext": BuildExt},
    }


if os.environ.get("FASTOPT_AOT", "1") == "0":
    setup(cmdclass={"build_py": BuildPy})
else:
    setup(**compiled_extension())
