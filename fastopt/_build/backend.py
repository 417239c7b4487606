"""Chooses the backend of a device type: a library of kernels or the reference path, once a process, on first use."""

import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import cache, commands
from .commands import BuildError
from .environment import requested_backend

_lock = threading.Lock()


@dataclass(frozen=True)
class Backend:
    """A loaded library, or the reference path (``module`` None), and why it was chosen.

    For CUDA tensors ``module`` is the extension too, and ``library`` the CUDA library that it has opened.
    """

    module: ModuleType | None
    reason: str
    library: Path | None = None
    failure: BuildError | None = None

    @classmethod
    def failed(cls, error):
        return cls(None, str(error), failure=error)


class Kernels:
    """The kernels of one device type. A subclass knows their library.

    ``find()`` gives the path of one that matches this process, or None; ``compile(verbose)`` the path of one that it
    compiles just in time; ``load(library)`` the backend.
    """

    name: str  # in messages
    warning: str  # if there are none, with a place for the cause
    backend = None  # chosen by the first use

    def unavailable(self):
        """The backend where no library is looked for, or None."""
        return Backend(None, "FASTOPT_BACKEND=reference") if requested_backend() == "reference" else None

    def resolve(self):
        """Choose the backend; compile if there is nothing to load; warn, once, if that fails."""
        requested = requested_backend()
        with _lock:
            if self.backend is not None:
                return self.backend
            try:
                self.backend = self.unavailable() or self.load(self.find() or self.compile())
            except BuildError as error:
                self.backend = Backend.failed(error)
            backend = self.backend
        if backend.failure is not None and requested == "auto":
            warnings.warn(self.warning.format(backend.failure), RuntimeWarning, stacklevel=3)
        return backend

    def existing(self):
        """The backend, or None if a library would have to be compiled first."""
        with _lock:
            if self.backend is None:
                try:
                    library = self.find()
                    self.backend = self.load(library) if library else None
                except BuildError as error:
                    return Backend.failed(error)
            return self.backend

    def build(self, verbose):
        """Path of a library, compiled if need be; a failure before is forgotten."""
        with _lock:
            library = self.find() or self.compile(verbose)
            if self.backend is not None and self.backend.failure is not None:
                self.backend = None
        return library

    def raise_if_requested(self, failure):
        """
        Raises:
            RuntimeError: ``FASTOPT_BACKEND=native``.
        """
        if requested_backend() == "native":
            raise RuntimeError(f"FASTOPT_BACKEND=native, but the {self.name} cannot be used: {failure}") from failure


def _after_fork_in_child():
    """A thread of the parent may hold the lock, and would never free the child's copy."""
    global _lock
    _lock = threading.Lock()
    cache.close_locks_after_fork()
    commands.spawn_lock.release()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(
        before=commands.spawn_lock.acquire,
        after_in_parent=commands.spawn_lock.release,
        after_in_child=_after_fork_in_child,
    )
