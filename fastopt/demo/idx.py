"""Reads IDX files, the format of MNIST, packed by gzip or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """A data file is missing or broken; the message names the file and its fault."""


def read_idx(path, n_dims):
    """Unsigned bytes of one IDX file.

    Args:
        path: the file; gzip is recognised by content, not by name.
        n_dims: number of dimensions that the file must have: 3 for images, 1 for labels.

    Returns:
        uint8 array of the shape in the header; it owns its memory and is writable.

    Raises:
        DataError: the file cannot be read, is not such a file, or holds fewer or more bytes than its header says.
    """
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from error
    header = struct.Struct(f">4s{n_dims}I")
    expected = bytes((0, 0, 8, n_dims))  # 8: of unsigned bytes
    if content[:4] != expected:
        raise DataError(f"{path}: magic bytes must be {expected.hex()}, got {content[:4].hex() or 'an empty file'}")
    if len(content) < header.size:
        raise DataError(f"{path}: truncated: header needs {header.size} bytes, got {len(content)}")
    _, *shape = header.unpack_from(content)
    n_expected, n_found = math.prod(shape), len(content) - header.size
    if n_found != n_expected:
        wrong, got = ("truncated", n_found) if n_found < n_expected else ("too long", "more")
        raise DataError(f"{path}: {wrong}: shape {tuple(shape)} needs {n_expected} bytes, got {got}")
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape).copy()
