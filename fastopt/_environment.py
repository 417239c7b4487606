"""Checks the environment variables that fastopt reads, so that a command names a bad one before it does anything."""

import os

from . import _build, _build_cuda, _jit, _native


def check():
    """
    Raises:
        ValueError: a variable breaks its rule; the message names variable, rule and value.
    """
    try:
        _native.requested_backend()
        _build_cuda.requested()
        _build_cuda.listed_architectures()
        _build.named_compiler()
    except _build.BuildError as error:
        raise ValueError(str(error)) from error
    _check_max_jobs()
    _check_flag("FASTOPT_WERROR")
    _check_cache_dir()


def _check_flag(name):
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")


def _check_max_jobs():
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isascii() and value.isdigit()):
        raise ValueError(f"MAX_JOBS must be a whole number >= 0, got {value!r}")


def _check_cache_dir():
    """The cache must be a directory or a path at which one can be made, so not below a file."""
    folder = _jit.cache_dir()
    exists = next(filter(os.path.lexists, (folder, *folder.parents)), None)  # None on a drive that is not there
    if exists is None or not os.path.isdir(exists):
        name = next((name for name in ("FASTOPT_CACHE_DIR", "XDG_CACHE_HOME") if os.environ.get(name)), None)
        value = os.environ[name] if name else str(folder)  # below the home directory: another place must be named
        raise ValueError(
            f"{name or 'FASTOPT_CACHE_DIR'} must name a directory, or a path at which one can be made, got {value!r}"
        )
