"""The environment variables that fastopt reads, and :func:`check`, by which a command names a bad one at once.

``TORCH_CUDA_ARCH_LIST`` is read in architectures.py.
"""

import os
import shutil
from pathlib import Path

from .architectures import listed_architectures
from .commands import BadVariable, BuildError

BACKENDS = ("auto", "native", "reference")


def check():
    """
    Raises:
        ValueError: a variable breaks its rule; the message names variable, rule and value.
    """
    try:
        requested_backend()
        flag("FASTOPT_CUDA")
        listed_architectures()
        named_compiler()
    except BuildError as error:
        raise ValueError(str(error)) from error
    if max_jobs() is None:
        raise ValueError(f"MAX_JOBS must be a whole number >= 0, got {os.environ['MAX_JOBS']!r}")
    flag("FASTOPT_WERROR")
    _check_cache_dir()


def requested_backend():
    """The value of ``FASTOPT_BACKEND``.

    Raises:
        ValueError: it is unknown.
    """
    backend = os.environ.get("FASTOPT_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"FASTOPT_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def flag(name):
    """The value of a variable such as ``FASTOPT_CUDA``: True for 1, False for 0, None if it is not set.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


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


def max_jobs():
    """Number of programs that a build may run at once, from ``MAX_JOBS``; None if it holds no number."""
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    return max(1, int(value)) if value.isascii() and value.isdigit() else None


def sanitizers():
    """The value of ``FASTOPT_SANITIZE``, a developer's option: sanitizers as -fsanitize takes them."""
    return os.environ.get("FASTOPT_SANITIZE", "")


def cache_dir():
    """``$FASTOPT_CACHE_DIR``, else ``$XDG_CACHE_HOME/fastopt``, else ``~/.cache/fastopt``."""
    named = os.environ.get("FASTOPT_CACHE_DIR")
    folder = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastopt")
    return Path(os.path.abspath(os.path.expanduser(folder)))


def _check_cache_dir():
    """The cache must be a directory or a path at which one can be made, so not below a file."""
    folder = cache_dir()
    exists = next(filter(os.path.lexists, (folder, *folder.parents)), None)  # None on a drive that is not there
    if exists is None or not os.path.isdir(exists):
        name = next((name for name in ("FASTOPT_CACHE_DIR", "XDG_CACHE_HOME") if os.environ.get(name)), None)
        value = os.environ[name] if name else str(folder)  # below the home directory: another place must be named
        raise ValueError(
            f"{name or 'FASTOPT_CACHE_DIR'} must name a directory, or a path at which one can be made, got {value!r}"
        )
