"""Where the demo's digits come from: folders, their order, files that disagree, and the download."""

import os

import numpy as np
import pytest
import torch

from fastopt.demo import data, glyphs
from fastopt.demo.data import DataError
from idx_files import write_mnist
from paths import ROOT


def real_mnist():
    """Folder of the real MNIST, or None."""
    places = [os.environ.get("FASTOPT_DATA"), ROOT.parent / "shared" / "data"]
    return next((place for place in places if place and data._find_raw(place)), None)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty place with no digits around it."""
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.delenv("FASTOPT_DATA", raising=False)
    return place


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_folder_is_accepted_with_its_files_in_it_or_below(nowhere, below, packed):
    write_mnist(nowhere / "mine" / below, packed=packed)
    digits = data.load(nowhere / "mine")
    assert digits.train.images.shape == (6, 1, 28, 28)
    assert digits.train.images.dtype == torch.uint8
    assert digits.test.labels.shape == (4,)
    assert digits.test.labels.dtype == torch.int64
    assert str(nowhere / "mine") in digits.source


def test_environment_comes_before_usual_places_and_after_a_named_folder(nowhere, monkeypatch):
    for n, name in ((10, "named"), (20, "environment"), (30, "data")):
        write_mnist(nowhere / name, n_train=n)
    monkeypatch.setenv("FASTOPT_DATA", str(nowhere / "environment"))
    assert len(data.load(nowhere / "named").train.labels) == 10
    assert len(data.load().train.labels) == 20
    monkeypatch.delenv("FASTOPT_DATA")
    assert len(data.load().train.labels) == 30


def test_named_place_without_digits_is_an_error_and_not_a_reason_to_draw(nowhere, monkeypatch):
    with pytest.raises(DataError, match=f"--data: no IDX files .* in {nowhere}"):
        data.load(nowhere)
    monkeypatch.setenv("FASTOPT_DATA", "/there/is/none")
    with pytest.raises(DataError, match=r"\$FASTOPT_DATA: no IDX files .* in /there/is/none"):
        data.load()


@pytest.mark.parametrize(
    ("replaced", "wrong"),
    [
        ({"train_images_idx3": np.zeros((6, 28, 27), np.uint8)}, r"train-images.*: images must be \(28, 28\)"),
        ({"train_labels_idx1": np.zeros(5, np.uint8)}, "train-labels.*: 5 labels for the 6 images"),
        (
            {"t10k_labels_idx1": np.array([0, 9, 10, 3], np.uint8)},
            r"t10k-labels.*: labels must be in \[0, 10\), got 10",
        ),
        ({"t10k_images_idx3": np.zeros((4, 28), np.uint8)}, "t10k-images.*: magic bytes must be 00000803"),
        (
            {"t10k_images_idx3": np.zeros((0, 28, 28), np.uint8), "t10k_labels_idx1": np.zeros(0, np.uint8)},
            "t10k-images.*: holds no images",
        ),
    ],
)
def test_files_that_disagree_are_named(nowhere, replaced, wrong):
    write_mnist(nowhere / "mine" / "raw", **replaced)
    with pytest.raises(DataError, match=wrong):
        data.load(nowhere / "mine")


def test_missing_and_truncated_files_among_the_four_are_named(nowhere):
    raw = write_mnist(nowhere / "MNIST" / "raw")
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{images}: truncated"):
        data.load(nowhere)
    images.unlink()
    with pytest.raises(DataError, match=f"{images}: missing"):
        data.load(nowhere)
    images.mkdir()
    with pytest.raises(DataError, match=f"{images}: cannot be read: Is a directory"):
        data.load(nowhere)


def test_real_mnist_is_read_where_it_is():
    folder = real_mnist()
    if folder is None:
        pytest.skip("no MNIST in $FASTOPT_DATA or ../shared/data")
    digits = data.load(folder)
    assert digits.train.images.shape == (60000, 1, 28, 28)
    assert digits.test.images.shape == (10000, 1, 28, 28)
    assert digits.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    normalized = digits.normalize(digits.train.images)
    assert abs(normalized.mean()) < 1e-3
    assert abs(normalized.std() - 1) < 1e-3


def test_no_files_mean_drawn_digits(nowhere, monkeypatch):
    monkeypatch.setattr(glyphs, "draw", lambda n, stream, draw=glyphs.draw: draw(n // 100, stream))
    digits = data.load()
    assert digits.source == "digits drawn by fastopt"
    assert len(digits.train.labels) == data.N_DRAWN_TRAIN // 100


@pytest.mark.parametrize("folder", [None, "mine"])
def test_download_fetches_what_is_missing_into_the_folder_and_reads_it(folder, nowhere, monkeypatch):
    asked, there = [], write_mnist(nowhere / "there", packed=True)

    def fetch(url, path):
        asked.append(url)
        os.replace(there / url.rsplit("/", 1)[1], path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        digits = data.load(folder, download=True)
        assert (len(digits.train.labels), len(digits.test.labels)) == (6, 4)
        assert digits.source.endswith("MNIST/raw")
    assert asked == [f"{data.MIRROR}{name}.gz" for name in data.FILES]


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("a broken answer")])
def test_download_that_fails_is_named_with_its_folder(error, nowhere, monkeypatch):
    def fail(url, path):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(data.DownloadError, match=f"--download: MNIST could not be fetched into data: {error}"):
        data.load(download=True)
