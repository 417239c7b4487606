"""Finds the digits: MNIST from a folder or through torchvision, else digits that the package draws itself.

Without ``--data`` these are tried in turn: ``$FASTOPT_DATA``, then ``./data``, ``../data`` and ``~/data``,
each holding the four IDX files (packed or not) itself, in ``raw`` or in ``MNIST/raw``.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import glyphs
from .idx import DataError, read_idx
from .vision import import_torchvision

N_CLASSES = 10
IMAGE_SHAPE = (28, 28)
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, as in PyTorch's example
USUAL_PLACES = ("./data", "../data", "~/data")
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
N_DRAWN_TRAIN, N_DRAWN_TEST = 12000, 2000


class DownloadError(DataError):
    """The digits could not be fetched."""


@dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, 1, 28, 28), and their labels, int64 of shape (N,)."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Digits:
    """Both splits, where they come from, and the transform of a uint8 batch to a network's input."""

    train: Split
    test: Split
    source: str
    reader: str
    normalize: Callable


def load(folder=None, *, download=False):
    """The digits of ``folder``, of the usual places, or drawn.

    Args:
        folder: where the IDX files are, or None to search. With ``download`` the root that torchvision fills.
        download: fetch MNIST through ``torchvision.datasets.MNIST(download=True)`` first.

    Raises:
        DataError: ``folder`` or ``$FASTOPT_DATA`` holds no digits, a file is broken, or there is no torchvision.
        DownloadError: the download failed.
    """
    if download:
        folder = _download(Path(folder or USUAL_PLACES[0]))
    for name, place in (("--data", folder), ("$FASTOPT_DATA", os.environ.get("FASTOPT_DATA"))):
        if place:
            raw = _find_raw(place)
            if raw is None:
                raise DataError(f"{name}: no IDX files such as {FILES['train'][0]}[.gz] in {place}, raw or MNIST/raw")
            return _read(raw)
    raw = next(filter(None, map(_find_raw, USUAL_PLACES)), None)
    return _read(raw) if raw else draw()


def draw(n_train=N_DRAWN_TRAIN, n_test=N_DRAWN_TEST):
    """Digits drawn by the package: the same on every machine, no file needed."""
    splits = [_split(*glyphs.draw(n, stream)) for stream, n in enumerate((n_train, n_test))]
    return Digits(*splits, "digits drawn by fastopt", "fastopt.demo.glyphs", _normalizer())


def _find_raw(place):
    place = Path(place).expanduser()
    names = [name + suffix for pair in FILES.values() for name in pair for suffix in ("", ".gz")]
    folders = place, place / "raw", place / "MNIST" / "raw"
    return next((folder for folder in folders if any((folder / name).exists() for name in names)), None)


def _read(raw):
    arrays, reader = _read_torchvision(raw), "torchvision.datasets.MNIST"
    if arrays is None:
        arrays, reader = _read_idx_files(raw), "fastopt.demo.idx"
    splits = [_split(*arrays[kind], *(raw / name for name in FILES[kind])) for kind in ("train", "test")]
    return Digits(*splits, str(raw), reader, _normalizer())


def _read_idx_files(raw):
    pairs = {kind: zip(names, (3, 1), strict=True) for kind, names in FILES.items()}
    return {kind: [read_idx(_existing(raw / name), n_dims) for name, n_dims in pair] for kind, pair in pairs.items()}


def _existing(path):
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise DataError(f"{path}: missing, and so is {packed.name}")
    return path if path.exists() else packed


def _read_torchvision(raw):
    """Arrays by torchvision, which wants unpacked files in ``MNIST/raw``; None leaves the files to our own reader."""
    torchvision, _ = import_torchvision()
    is_unpacked = all((raw / name).is_file() for pair in FILES.values() for name in pair)
    if torchvision is None or not is_unpacked or raw.absolute().parts[-2:] != ("MNIST", "raw"):
        return None
    try:
        sets = {kind: torchvision.datasets.MNIST(raw.absolute().parents[1], train=kind == "train") for kind in FILES}
    except Exception:  # broken files: our own reader reports which one and why
        return None
    return {kind: (dataset.data.numpy(), dataset.targets.numpy()) for kind, dataset in sets.items()}


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


def _normalizer():
    """The transform of a uint8 batch: torchvision's or ours, which give equal floats."""
    torchvision, _ = import_torchvision()
    if torchvision is None:
        return _normalize
    transforms = torchvision.transforms
    return transforms.Compose([transforms.ConvertImageDtype(torch.float32), transforms.Normalize((MEAN,), (STD,))])


def _normalize(images):
    return images.float().div_(255).sub_(MEAN).div_(STD)


def _download(root):
    torchvision, reason = import_torchvision()
    if torchvision is None:
        raise DataError(f"--download needs torchvision, which does not import here ({reason})")
    try:
        for train in (True, False):
            torchvision.datasets.MNIST(root, train=train, download=True)
    except Exception as error:
        raise DownloadError(f"--download: torchvision could not fetch MNIST into {root}: {error}") from error
    return root
