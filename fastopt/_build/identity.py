"""The identity of a library: what it was built from and for, in a file beside it, such as ``_C.json``."""

import hashlib
import json
from pathlib import Path

from .commands import BuildError

PACKAGE = Path(__file__).resolve().parents[1]  # the folder fastopt/, into which installation puts libraries


def csrc():
    """Folder of the C++ sources: inside an installed package, beside the package in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def digest(files, recipe):
    """Hash of all that a build reads from fastopt: ``files`` below csrc/, and the Python file with its flags."""
    total = hashlib.sha256(Path(recipe).read_bytes())
    for path in sorted(files):
        total.update(f"\n{path.relative_to(csrc())}\n".encode() + path.read_bytes())
    return total.hexdigest()


def file_of(library):
    """Path of a library's identity file: ``_C.json`` for ``_C.cpython-311-x86_64-linux-gnu.so``."""
    return library.with_name(library.name.partition(".")[0] + ".json")


def write(library, entries):
    """Write a library's identity file; entries that are for information need not match."""
    file_of(library).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def compile_with_identity(target, work, verbose):
    """Path of a library, compiled in ``work`` with its identity file beside it.

    Raises:
        BuildError: compiling failed, or the sources changed during it.
    """
    built_for = target.identity()
    library = target.compile(work, verbose)
    if target.identity() != built_for:
        raise BuildError(f"{csrc()} changed during the build", "try again")
    write(library, {**built_for, **target.details(), "sha256": sha256(library)})
    return library


def read(library):
    """The identity that a library was built with; empty if there is no readable one."""
    try:
        found = json.loads(file_of(library).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path):
    """Checksum of a file, or None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def matches(library, identity):
    """True if the library's identity file agrees with ``identity``."""
    return read(library).items() >= identity.items()


def is_intact(library, identity):
    """True if the library matches ``identity`` and has the checksum that its identity file records."""
    checksum = read(library).get("sha256")
    return matches(library, identity) and checksum is not None and sha256(library) == checksum
