"""Finds the digits: MNIST in a folder of IDX files, else digits that the package draws itself.

Without ``--data`` these are tried in turn: ``$FASTOPT_DATA``, then ``./data``, ``../data`` and ``~/data``,
each holding the four IDX files (packed by gzip or not) itself, in ``raw`` or in ``MNIST/raw``.
"""

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import glyphs

N_CLASSES, IMAGE_SHAPE = 10, (28, 28)
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, as in PyTorch's example
USUAL_PLACES = ("./data", "../data", "~/data")
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # PyTorch's
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
N_DRAWN_TRAIN, N_DRAWN_TEST = 12000, 2000


class DataError(ValueError):
    """A data file is missing or broken; the message names the file and its fault."""


class DownloadError(DataError):
    """The digits could not be fetched."""


@dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, 1, 28, 28), and their labels, int64 of shape (N,)."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Digits:
    """Both splits, where they come from, and the module that made them."""

    train: Split
    test: Split
    source: str
    reader: str

    @staticmethod
    def normalize(images):
        """A network's input from uint8 images."""
        return images.float().div_(255).sub_(MEAN).div_(STD)


def load(folder=None, *, download=False):
    """The digits of ``folder``, of the usual places, or drawn; ``download`` fetches MNIST into ``folder/MNIST/raw``.

    Raises:
        DataError: ``folder`` or ``$FASTOPT_DATA`` holds no digits, a file is broken, or the download failed.
    """
    if download:
        folder = _download(Path(folder or USUAL_PLACES[0]))
    for name, place in (("--data", folder), ("$FASTOPT_DATA", os.environ.get("FASTOPT_DATA"))):
        if place:
            raw = _find_raw(place)
            if raw is None:
                raise DataError(f"{name}: no IDX files such as {FILES[0]}[.gz] in {place}, raw or MNIST/raw")
            return _read(raw)
    raw = next(filter(None, map(_find_raw, USUAL_PLACES)), None)
    return _read(raw) if raw else draw()


def draw(n_train=N_DRAWN_TRAIN, n_test=N_DRAWN_TEST):
    """Digits drawn by the package: the same on every machine, no file needed."""
    splits = [_split(*glyphs.draw(n, stream)) for stream, n in enumerate((n_train, n_test))]
    return Digits(*splits, "digits drawn by fastopt", "fastopt.demo.glyphs")


def _download(root):
    raw = root / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if not _existing(raw / name):
                torch.hub.download_url_to_file(f"{MIRROR}{name}.gz", str(raw / f"{name}.gz"))
    except Exception as error:
        raise DownloadError(f"--download: MNIST could not be fetched into {root}: {error}") from error
    return root


def _existing(path):
    """The file, packed or not; None if there is none."""
    return next(filter(Path.exists, (path, path.with_name(f"{path.name}.gz"))), None)


def _find_raw(place):
    place = Path(place).expanduser()
    folders = place, place / "raw", place / "MNIST" / "raw"
    return next((folder for folder in folders if any(_existing(folder / name) for name in FILES)), None)


def _read(raw):
    files = [_existing(raw / name) for name in FILES]
    if None in files:
        name = FILES[files.index(None)]
        raise DataError(f"{raw / name}: missing, and so is {name}.gz")
    arrays = [read_idx(file, 3 if "images" in file.name else 1) for file in files]
    splits = [_split(*arrays[i : i + 2], *files[i : i + 2]) for i in (0, 2)]
    return Digits(*splits, str(raw), "fastopt.demo.data")


def read_idx(path, n_dims):
    """Unsigned bytes of one IDX file as a writable array: of 3 dimensions for images, of 1 for labels.

    Raises:
        DataError: the file cannot be read, is not such a file, or holds fewer or more bytes than its header says.
    """
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    header, expected = struct.Struct(f">4s{n_dims}I"), bytes((0, 0, 8, n_dims))  # 8: of unsigned bytes
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


def _split(images, labels, image_file="drawn images", label_file="drawn labels"):
    if images.shape[1:] != IMAGE_SHAPE:
        raise DataError(f"{image_file}: images must be {IMAGE_SHAPE}, got {images.shape[1:]}")
    if len(images) != len(labels):
        raise DataError(f"{label_file}: {len(labels)} labels for the {len(images)} images of {image_file}")
    if len(images) == 0:
        raise DataError(f"{image_file}: holds no images")
    if labels.max() >= N_CLASSES:
        raise DataError(f"{label_file}: labels must be in [0, {N_CLASSES}), got {labels.max()}")
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())
