"""Writes IDX files, the format of MNIST."""

import gzip
import struct

import numpy as np


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, n_train=6, n_test=4, packed=False, **replaced):
    """The four files, of a few random images; ``replaced`` maps a name's first words to an array instead."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, n in (("train", n_train), ("t10k", n_test)):
        for part, array in (
            (f"{kind}-images-idx3", random.integers(0, 256, (n, 28, 28), np.uint8)),
            (f"{kind}-labels-idx1", random.integers(0, 10, n, np.uint8)),
        ):
            content = idx_bytes(replaced.get(part.replace("-", "_"), array))
            path = folder / f"{part}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder
