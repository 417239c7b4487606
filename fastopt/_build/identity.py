"""The identity of a library: what it was built from and for, in a file beside it, such as ``_C.json``."""

import hashlib
import json
from pathlib import Path

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


def write(library, identity, **more):
    """Write a library's identity file; ``more`` holds entries that need not match."""
    file_of(library).write_text(json.dumps({**identity, **more}, indent=1) + "\n", encoding="utf-8")


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
