"""Reads IDX files, the format of MNIST, packed by gzip or not, trusting nothing that the header claims."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08
_PIECE_BYTES = 1 << 20


class DataError(ValueError):
    """A data file is missing or broken; the message names the file and what is wrong with it."""


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
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP_MAGIC
        with (gzip.open if packed else open)(path, "rb") as file:
            shape = _read_shape(file, path, n_dims)
            return np.frombuffer(_read_bytes(file, path, shape), np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _read_shape(file, path, n_dims):
    magic = file.read(4)
    expected = bytes((0, 0, _UINT8, n_dims))
    if magic != expected:
        raise DataError(f"{path}: magic bytes must be {expected.hex()}, got {magic.hex() or 'an empty file'}")
    dims = file.read(4 * n_dims)
    if len(dims) < 4 * n_dims:
        raise DataError(f"{path}: truncated: header needs {4 + 4 * n_dims} bytes, got {4 + len(dims)}")
    return struct.unpack(f">{n_dims}I", dims)


def _read_bytes(file, path, shape):
    """The bytes after the header, piece by piece: a huge shape in the header costs no memory that no byte fills."""
    n_expected = math.prod(shape)
    content = bytearray()
    while len(content) <= n_expected:
        piece = file.read(min(_PIECE_BYTES, n_expected + 1 - len(content)))
        if not piece:
            break
        content += piece
    if len(content) != n_expected:
        wrong = "truncated" if len(content) < n_expected else "too long"
        got = len(content) if len(content) < n_expected else "more"
        raise DataError(f"{path}: {wrong}: shape {shape} needs {n_expected} bytes, got {got}")
    return content
