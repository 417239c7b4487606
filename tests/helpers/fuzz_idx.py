"""Fuzzes the reader of IDX files: a mutated file, packed or not, gives the array that it holds, or else a DataError.

python tests/helpers/fuzz_idx.py [seconds] [seed]
"""

import gzip
import io
import math
import random
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from fastopt.demo.data import DataError, read_idx

NUMBERS = [0, 1, 2, 27, 28, 29, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
SHAPES = [(0,), (1,), (10,), (0, 28, 28), (1, 28, 28), (2, 3, 5), (4, 0, 7)]


def whole(shape):
    values = np.arange(math.prod(shape), dtype=np.uint32).astype(np.uint8)
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values.tobytes()


def mutated(content, rng):
    """The content with one to four changes of the kinds that break files."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(content) + 1)
        kind = rng.choice(["cut", "drop", "insert", "flip", "number", "repeat", "pack"])
        if kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + rng.choice([1, 2, 4])]
        elif kind == "insert":
            content[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "number":
            offset = 4 * rng.randrange(4)
            content[offset : offset + 4] = struct.pack(">I", rng.choice(NUMBERS))
        elif kind == "repeat":
            content += content[at:]
        elif kind == "pack":
            content = bytearray(gzip.compress(bytes(content), mtime=0))
    return bytes(content)


def expected(content, n_dims):
    """The array in a file, or None: an independent reading of the format."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read()
        except (OSError, EOFError, zlib.error):
            return None
    header = 4 + 4 * n_dims
    if content[:4] != bytes((0, 0, 8, n_dims)) or len(content) < header:
        return None
    shape = struct.unpack(f">{n_dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        return None
    return np.frombuffer(content[header:], np.uint8).reshape(shape)


def fuzz(n_seconds, seed, path):
    """Files tried and how many of them were whole."""
    rng = random.Random(seed)
    files = [whole(shape) for shape in SHAPES]
    files += [gzip.compress(file, mtime=0) for file in files]
    end, n_files, n_whole = time.monotonic() + n_seconds, 0, 0
    while time.monotonic() < end:
        content = mutated(rng.choice(files), rng)
        n_dims = rng.choice([1, 3])
        path.write_bytes(content)
        wanted = expected(content, n_dims)
        found, refusal = None, ""
        try:
            found = read_idx(path, n_dims)
        except DataError as error:
            refusal = str(error)
        assert (found is None) == (wanted is None), f"{refusal or 'accepted'}: {content!r}"
        if found is not None:
            np.testing.assert_array_equal(found, wanted)
            n_whole += 1
        n_files += 1
    return n_files, n_whole


if __name__ == "__main__":
    n_seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        n_files, n_whole = fuzz(n_seconds, seed, Path(folder) / "file")
    print(f"{n_files} files in {n_seconds} s, {n_whole} of them whole: no disagreement")
