"""The demo's data: IDX files whole and broken, where they are looked for, torchvision, and the drawn digits."""

import gzip
import hashlib
import importlib.util
import os
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_idx
from fastopt.demo import data, glyphs, models, vision
from fastopt.demo.idx import DataError, read_idx
from paths import ROOT

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


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


# IDX files.


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (1000,), (2, 3, 5), (3, 28, 28), (0, 28, 28), (4, 0, 7)])
def test_array_written_is_array_read(tmp_path, shape, packed):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    read = read_idx(path, len(shape))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.uint8
    assert read.shape == shape
    assert read.flags.writeable


IMAGES = idx_bytes(np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28))
HUGE = struct.pack(">4sIII", bytes((0, 0, 8, 3)), 2**32 - 1, 2**32 - 1, 2**32 - 1)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "empty file"),
        (b"\0\0", "magic bytes must be 00000803, got 0000"),
        (b"\0\0\x08\x01" + IMAGES[4:], "got 00000801"),  # labels where images should be
        (b"\0\0\x0d\x03" + IMAGES[4:], "got 00000d03"),  # floats
        (b"PK\x03\x04" + IMAGES[4:], "got 504b0304"),
        (IMAGES[:10], "truncated: header needs 16 bytes, got 10"),
        (IMAGES[:16], "truncated: .* needs 1568 bytes, got 0"),
        (IMAGES[:-1], "truncated: .* needs 1568 bytes, got 1567"),
        (IMAGES + b"\0", "too long: .* needs 1568 bytes, got more"),
        (HUGE + b"\1\2\3", "truncated: .* got 3"),
        (struct.pack(">4siii", bytes((0, 0, 8, 3)), -1, 28, 28), "truncated"),  # a negative dimension
        (gzip.compress(IMAGES)[:-9], "cannot be read"),
        (gzip.compress(IMAGES)[:40], "cannot be read"),
        (gzip.compress(IMAGES)[:-8] + b"\0\0\0\0" + gzip.compress(IMAGES)[-4:], "cannot be read: CRC"),
        (gzip.compress(IMAGES)[:12] + b"\xff\xff\xff" + gzip.compress(IMAGES)[15:], "cannot be read"),
        (gzip.compress(IMAGES[:-1]), "truncated"),
        (gzip.compress(IMAGES + b"\0"), "too long"),
        (gzip.compress(HUGE), "truncated"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_broken_file_is_named_with_what_is_wrong(tmp_path, content, wrong):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: .*{wrong}"):
        read_idx(path, 3)


def test_directory_and_absent_file_are_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read_idx(tmp_path, 3)
    with pytest.raises(DataError, match="absent: cannot be read: No such file"):
        read_idx(tmp_path / "absent", 3)


@pytest.mark.parametrize("packed", [False, True])
def test_huge_header_allocates_no_more_than_the_file_justifies(tmp_path, packed):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(HUGE) if packed else HUGE)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read_idx(path, 3)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_bytes_give_the_array_or_a_data_error(tmp_path, draw):
    array = np.frombuffer(draw.draw(st.binary(max_size=60)), np.uint8)
    content = bytearray(idx_bytes(array))
    if draw.draw(st.booleans()):
        content = bytearray(gzip.compress(bytes(content), mtime=0))
    whole = bytes(content)
    kind = draw.draw(st.sampled_from(["whole", "cut", "longer", "changed", "random"]))
    if kind == "cut":
        content = content[: draw.draw(st.integers(0, len(content)))]
    elif kind == "longer":
        content += draw.draw(st.binary(min_size=1, max_size=20))
    elif kind == "changed":
        content[draw.draw(st.integers(0, len(content) - 1))] ^= draw.draw(st.integers(1, 255))
    elif kind == "random":
        content = draw.draw(st.binary(max_size=100))
    path = tmp_path / "file"
    path.write_bytes(content)
    try:
        read = read_idx(path, 1)
    except DataError:
        assert bytes(content) != whole
    else:
        unpacked = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else bytes(content)
        assert idx_bytes(read) == unpacked


def test_the_reader_agrees_with_another_on_mutated_files(tmp_path):
    n_files, n_whole = fuzz_idx.fuzz(1, 0, tmp_path / "file")
    assert n_files > 50
    assert n_whole > 0


# Where the digits come from.


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
@pytest.mark.parametrize("below", ["raw", "MNIST/raw"])  # torchvision, where it imports, reads the latter
def test_files_that_disagree_are_named(nowhere, below, replaced, wrong):
    write_mnist(nowhere / "mine" / below, **replaced)
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


# torchvision, present, absent or broken.


@needs_torchvision
def test_torchvision_datasets_and_transforms_import_beside_any_torch():
    torchvision, reason = vision.import_torchvision()
    assert reason is None
    assert torchvision.datasets.MNIST
    assert torchvision.transforms.Normalize


@needs_torchvision
def test_torchvision_and_our_reader_give_equal_digits(nowhere):
    raw = write_mnist(nowhere / "MNIST" / "raw", n_train=50)
    by_torchvision = data.load(nowhere)
    assert by_torchvision.reader == "torchvision.datasets.MNIST"
    ours = data._read_idx_files(raw)
    np.testing.assert_array_equal(by_torchvision.train.images[:, 0].numpy(), ours["train"][0])
    np.testing.assert_array_equal(by_torchvision.test.labels.numpy(), ours["test"][1])


@needs_torchvision
def test_torchvision_and_our_normalization_give_equal_floats():
    images = torch.arange(256).repeat(49).to(torch.uint8).view(16, 1, 28, 28)
    by_torchvision = data._normalizer()
    assert by_torchvision is not data._normalize
    assert torch.equal(by_torchvision(images), data._normalize(images))


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "AttributeError", "ImportError", "SyntaxError"])
def test_torchvision_that_fails_to_import_breaks_nothing(nowhere, monkeypatch, error):
    (nowhere / "torchvision").mkdir()
    (nowhere / "torchvision" / "__init__.py").write_text(f"raise {error}('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(nowhere)
    vision.import_torchvision.cache_clear()
    try:
        module, reason = vision.import_torchvision()
        assert module is None
        assert reason.startswith(f"{error}: operator torchvision::nms")
        write_mnist(nowhere / "MNIST" / "raw")
        assert data.load(nowhere).reader == "fastopt.demo.idx"
        with pytest.raises(DataError, match="--download needs torchvision, which does not import here"):
            data.load(download=True)
    finally:
        vision.import_torchvision.cache_clear()


# Drawn digits.


def test_drawn_digits_are_the_same_everywhere():
    images, labels = glyphs.draw(200)
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == "7fa0fb33e8049a53"
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "91882486860d047c"


def test_first_drawn_digits_do_not_depend_on_how_many_follow():
    images, labels = glyphs.draw(57)
    more_images, more_labels = glyphs.draw(300)
    np.testing.assert_array_equal(images, more_images[:57])
    np.testing.assert_array_equal(labels, more_labels[:57])


def test_drawn_classes_are_balanced_and_streams_differ():
    images, labels = glyphs.draw(500)
    assert np.bincount(labels, minlength=10).tolist() == [50] * 10
    assert images.shape == (500, 28, 28)
    assert images.dtype == np.uint8
    others, _ = glyphs.draw(500, stream=1)
    assert not any((other == images).all(axis=(1, 2)).any() for other in others)
    assert len(np.unique(images.reshape(500, -1), axis=0)) == 500


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11])  # none, one, and around a round of the ten classes
def test_any_number_of_digits_can_be_drawn(n):
    images, labels = glyphs.draw(n)
    assert images.shape == (n, 28, 28)
    assert labels.shape == (n,)


def test_no_files_mean_drawn_digits(nowhere, monkeypatch):
    monkeypatch.setattr(data.glyphs, "draw", lambda n, stream, draw=glyphs.draw: draw(n // 100, stream))
    digits = data.load()
    assert digits.source == "digits drawn by fastopt"
    assert len(digits.train.labels) == data.N_DRAWN_TRAIN // 100


def test_linear_model_is_less_accurate_than_lenet_on_drawn_digits():
    digits = data.draw(6000, 1000)
    images, labels = digits.normalize(digits.train.images), digits.train.labels

    def test_accuracy(model, n_epochs):
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(n_epochs):
            for rows in torch.arange(len(labels)).split(100):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            right = model(digits.normalize(digits.test.images)).argmax(1) == digits.test.labels
        return right.float().mean().item()

    torch.manual_seed(0)
    linear = test_accuracy(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), 8)
    lenet = test_accuracy(models.build("lenet", 0), 8)
    assert 0.5 < linear < 0.85
    assert lenet > 0.93
