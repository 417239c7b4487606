"""The demo's reader of IDX files: whole, packed and broken ones."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz_idx
from fastopt.demo.data import DataError, read_idx
from idx_files import idx_bytes


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


@pytest.mark.slow
def test_the_reader_agrees_with_another_on_mutated_files(tmp_path):
    n_files, n_whole = fuzz_idx.fuzz(1, 0, tmp_path / "file")
    assert n_files > 50
    assert n_whole > 0
