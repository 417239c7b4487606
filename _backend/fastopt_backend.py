"""The PEP 517/660 backend: setuptools, compiling against the torch of the environment pip installs into.

Build isolation hides that environment, and a torch listed in ``build-system.requires`` would be a second, maybe
different one. So the target's own interpreter is asked where its torch is, and its import path is appended to ours.
No torch there, one that is too old, or no working compiler: the wheel carries sources only, and the library is
compiled just in time on first use. Only FASTOPT_CUDA=1, which asks for a library, makes a failure to compile an error.
"""

import json
import os
import re
import subprocess
import sys
import traceback

from setuptools import build_meta
from setuptools.build_meta import build_sdist  # noqa: F401  the front end calls it here

OLDEST_TORCH = (2, 11)

_PRINT_TARGET = """
import importlib.metadata, json, sys
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = None
print(json.dumps({"torch": torch, "path": [p for p in sys.path if p]}))
"""


def _target():
    """Version of torch (or None) and import path, as the target environment's interpreter sees them."""
    hidden_by_pip = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in hidden_by_pip}
    output = subprocess.run(
        [sys.executable, "-c", _PRINT_TARGET], env=env, stdout=subprocess.PIPE, check=True, cwd=os.sep
    )
    return json.loads(output.stdout)


def _why_not_ahead_of_time(torch_version):
    """The reason not to compile now, or None to compile."""
    if os.environ.get("FASTOPT_AOT") == "0":
        return "FASTOPT_AOT=0"
    if torch_version is None:
        return "the environment has no torch yet"
    release = tuple(int(number) for number in re.findall(r"\d+", torch_version)[:2])
    if release < OLDEST_TORCH:
        return f"its torch must be >= {'.'.join(map(str, OLDEST_TORCH))}, got {torch_version}"
    return None


def _run_setup(hook, *args, ahead_of_time=False):
    """Run a hook of setuptools; FASTOPT_AOT says to setup.py if the libraries are part of this build."""
    before = os.environ.get("FASTOPT_AOT")
    os.environ["FASTOPT_AOT"] = "1" if ahead_of_time else "0"
    try:
        return hook(*args)
    finally:
        if before is None:
            del os.environ["FASTOPT_AOT"]
        else:
            os.environ["FASTOPT_AOT"] = before


def _requires(hook, config_settings):
    requires = _run_setup(hook, config_settings)
    return requires if _why_not_ahead_of_time(_target()["torch"]) else [*requires, "ninja"]


def _build(hook, *args):
    """Run a build hook with the libraries in it; without them where that is impossible or fails."""
    target = _target()
    reason = _why_not_ahead_of_time(target["torch"])
    if reason is None:
        sys.path += [entry for entry in target["path"] if entry not in sys.path]  # after ours: our setuptools wins
        try:
            return _run_setup(hook, *args, ahead_of_time=True)
        except (Exception, SystemExit):
            if os.environ.get("FASTOPT_CUDA", "") not in ("", "0"):
                raise
            traceback.print_exc()
            reason = "compiling failed, see above (no C++20 compiler?)"
    print(f"fastopt: not compiled ahead of time: {reason}. First use compiles it just in time.", file=sys.stderr)
    return _run_setup(hook, *args)


def get_requires_for_build_sdist(config_settings=None):
    return _run_setup(build_meta.get_requires_for_build_sdist, config_settings)


def get_requires_for_build_wheel(config_settings=None):
    return _requires(build_meta.get_requires_for_build_wheel, config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _requires(build_meta.get_requires_for_build_editable, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _run_setup(build_meta.prepare_metadata_for_build_wheel, metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return _run_setup(build_meta.prepare_metadata_for_build_editable, metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _build(build_meta.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _build(build_meta.build_editable, wheel_directory, config_settings, metadata_directory)
