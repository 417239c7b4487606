"""Shuffles, votes, reductions and atomics on the shim give what CUDA's manual says."""

import ctypes
import functools
import operator

import pytest

from paths import CXX
from shim_self_test import IN_ORDER, SEEDS, SUCCESS, ints, unsigneds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CXX is None, reason="needs g++")]

VALUES = [(37 * lane) % 41 - 20 for lane in range(32)]


def low_bits(value):
    return value & 0xFFFFFFFF


def source_of(kind, lane, argument, width):
    """The lane that a shuffle reads, by CUDA's manual."""
    first = lane - lane % width
    source = {
        "shfl": first + argument % width,
        "up": lane - argument if lane - argument >= first else lane,
        "down": lane + argument if lane + argument < first + width else lane,
        "xor": lane ^ argument if lane ^ argument < first + width else lane,
    }
    return source[kind]


def exchange(library, kind, mask, argument, width):
    """The value of each lane in the mask; None for the others."""
    kinds = ("shfl", "up", "down", "xor", "ballot", "any", "all")
    kinds += ("reduce_add", "reduce_min", "reduce_max", "reduce_max_unsigned", "reduce_xor")
    out = (ctypes.c_int64 * 32)()
    values = (ctypes.c_int64 * 32)(*VALUES)
    assert library.exchange_lanes(kinds.index(kind), ctypes.c_uint(mask), argument, width, values, out) == SUCCESS
    return [out[lane] if mask >> lane & 1 else None for lane in range(32)]


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("kind", ["shfl", "up", "down", "xor"])
def test_shuffles_read_the_documented_lane(library, kind, width):
    for seed in (IN_ORDER, 0, 1):
        library.fastopt_shim_seed(seed)
        for argument in (0, 1, 3, 8, 16, 31):
            expected = [VALUES[source_of(kind, lane, argument, width)] for lane in range(32)]
            assert exchange(library, kind, 0xFFFFFFFF, argument, width) == expected, f"argument {argument}"


def test_shuffle_from_a_lane_outside_the_mask_is_garbage(library):
    assert exchange(library, "shfl", 0x0000FFFF, 3, 32)[:16] == [VALUES[3]] * 16
    assert exchange(library, "shfl", 0x0000FFFF, 20, 32)[:16] == [-1] * 16


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x00F00000])
@pytest.mark.parametrize(
    ("kind", "fold"),
    [
        ("ballot", lambda lanes: sum(1 << lane for lane, value in lanes if value > 0)),
        ("any", lambda lanes: any(value > 0 for _, value in lanes)),
        ("all", lambda lanes: all(value > 0 for _, value in lanes)),
        ("reduce_add", lambda lanes: sum(value for _, value in lanes)),
        ("reduce_min", lambda lanes: min(value for _, value in lanes)),
        ("reduce_max", lambda lanes: max(value for _, value in lanes)),
        ("reduce_max_unsigned", lambda lanes: max(low_bits(value) for _, value in lanes)),
        ("reduce_xor", lambda lanes: low_bits(functools.reduce(operator.xor, (value for _, value in lanes)))),
    ],
)
def test_votes_and_reductions_fold_the_lanes_of_the_mask(library, kind, fold, mask):
    lanes = [(lane, value) for lane, value in enumerate(VALUES) if mask >> lane & 1]
    for seed in (IN_ORDER, 0, 1):
        library.fastopt_shim_seed(seed)
        got = exchange(library, kind, mask, 0, 32)
        assert got == [int(fold(lanes)) if mask >> lane & 1 else None for lane in range(32)]


@pytest.mark.parametrize(("threads", "live"), [(64, 64), (64, 40), (48, 48), (1, 1), (1024, 1000)])
def test_votes_of_a_block_count_threads_that_have_not_exited(library, threads, live):
    for seed in (IN_ORDER, 0, 1):
        library.fastopt_shim_seed(seed)
        for threshold in (0, 1, live):
            out = ints(*[-1] * (3 * threads))
            assert library.vote_of(threads, live, threshold, out) == SUCCESS
            expected = [threshold, int(threshold == live), int(threshold > 0)] * live + [-1] * (3 * (threads - live))
            assert list(out) == expected


def test_atomic_counters_wrap_at_the_bound(library):
    for seed in (IN_ORDER, 0):
        library.fastopt_shim_seed(seed)
        up, down, seen = ctypes.c_uint(1), ctypes.c_uint(100), unsigneds(0, 0, 0, 0)
        assert library.step(9, ctypes.byref(up), ctypes.byref(down), 3, seen) == SUCCESS
        assert up.value == 2  # 1 2 3 0 1 2 3 0 1
        assert down.value == 3  # 100 is above the bound; 3 2 1 0 3 2 1 0, then 3
        assert list(seen) == [2, 3, 2, 2]


def test_last_block_sees_what_all_wrote(library):
    for seed in (IN_ORDER, *SEEDS):
        library.fastopt_shim_seed(seed)
        partial, done, total = ints(*[0] * 10), ctypes.c_uint(), ctypes.c_int()
        assert library.last_block(10, partial, ctypes.byref(done), ctypes.byref(total)) == SUCCESS
        assert (total.value, done.value) == (55, 0)
