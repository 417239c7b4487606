"""The shim that runs CUDA kernels on the CPU: it computes a device's results, and detects errors of kernels."""

import ctypes
import functools
import math
import operator
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from paths import TESTS, child_environment

SHIM = TESTS / "cuda_shim"
CXX = shutil.which("g++")
SEEDS = range(20)
IN_ORDER = -1
TIMEOUT_S = 300

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")

SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9
MISUSES = [
    name.strip()
    for name in (SHIM / "self_test.cu").read_text().split("enum Misuse : int {")[1].split("}")[0].split(",")
]


def compile_library(folder, *flags):
    # A second source, since the kernels of a library come from several.
    other = folder / "other.cu"
    other.write_text("#include <cuda_runtime.h>\n__device__ __constant__ int unused = 1;\n")
    library = folder / "self_test.so"
    sources = [str(SHIM / "self_test.cu"), str(other)]
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{SHIM}", *flags]
    subprocess.run([CXX, *options, "-x", "c++", *sources, "-o", str(library)], check=True, timeout=TIMEOUT_S)
    return library


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("shim_asan"), "-fsanitize=address")


@pytest.fixture
def library(path):
    library = load(path)
    yield library
    library.fastopt_shim_seed(IN_ORDER)


def load(path):
    library = ctypes.CDLL(str(path))
    library.fastopt_shim_seed.argtypes = [ctypes.c_longlong]
    library.error_name.restype = ctypes.c_char_p
    return library


# Code that a separate process runs after loading the library.
PRELUDE = f"""
import os
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_shim import *
library = load(sys.argv[1])
"""


def run_apart(path, code, **environment):
    command = [sys.executable, "-c", PRELUDE + code, str(path)]
    return subprocess.run(
        command, env=child_environment(**environment), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run_sanitized(path, code):
    # Python is not sanitized, so the runtime comes first; libstdc++ with it, for it wraps its exceptions.
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip() for name in names]
    return run_apart(path, code, LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0")


def ints(*values):
    return (ctypes.c_int * len(values))(*values)


def unsigneds(*values):
    return (ctypes.c_uint * len(values))(*values)


def sums_are_right(library, kind=0, rows=3, n=1000, blocks=2, threads=256):
    """True if the sums of rows of small whole numbers, which add without error, are correct."""
    values = [(7 * i + i // n) % 13 for i in range(rows * n)]
    out = (ctypes.c_float * rows)()
    assert library.sum_rows(kind, (ctypes.c_float * len(values))(*values), out, rows, n, blocks, threads) == SUCCESS
    return list(out) == [sum(values[row * n : (row + 1) * n]) for row in range(rows)]


# Order


@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_sums_are_right_in_every_order(library, threads):
    for seed in [IN_ORDER, *SEEDS]:
        library.fastopt_shim_seed(seed)
        assert sums_are_right(library, threads=threads), f"seed {seed}"


@pytest.mark.parametrize(("kind", "missing"), [(1, "read after write"), (2, "write after read")])
def test_missing_barrier_is_found_by_some_seed(library, kind, missing):
    wrong = []
    for seed in SEEDS:
        library.fastopt_shim_seed(seed)
        wrong.append(not sums_are_right(library, kind, rows=4, blocks=1))
    assert any(wrong), missing


def test_missing_syncwarp_is_found_by_every_seed(library):
    for seed in SEEDS:
        library.fastopt_shim_seed(seed)
        for barrier in (True, False):
            values = ints(*range(32))
            assert library.reverse(barrier, values) == SUCCESS
            assert (list(values) == [*range(31, -1, -1)]) == barrier


@pytest.mark.parametrize(("blocks", "threads"), [(24, 1), (1, 96)])
def test_seed_fixes_the_order(library, blocks, threads):
    n = blocks * threads

    def order(seed):
        library.fastopt_shim_seed(seed)
        listed = ints(*[-1] * n)
        assert library.list_order(blocks, threads, listed) == SUCCESS
        return tuple(listed)

    orders = [order(seed) for seed in SEEDS]
    assert order(IN_ORDER) == tuple(range(n))
    assert all(sorted(listed) == [*range(n)] for listed in orders)
    assert len(set(orders)) == len(orders)
    assert [order(seed) for seed in SEEDS] == orders
    if threads > 1:
        assert all(len({thread // 32 for thread in listed[:32]}) == 1 for listed in orders), "a warp runs in one go"


@pytest.mark.parametrize(("threads", "per_group"), [(32, 1), (96, 32)])  # lanes at a __syncwarp, warps at a barrier
def test_last_thread_at_a_barrier_need_not_leave_first(library, threads, per_group):
    pairs = []
    for seed in SEEDS:
        library.fastopt_shim_seed(seed)
        listed = ints(*[-1] * (2 * threads))
        assert library.list_order_twice(threads, listed) == SUCCESS
        pairs.append((listed[threads - 1] // per_group, listed[threads] // per_group))
    assert any(last != first for last, first in pairs)


def test_seed_and_multiprocessors_come_from_the_environment(path):
    code = "order = ints(*[-1] * 64); library.list_order(1, 64, order); print(library.multiprocessors(), *order)"
    default, seeded = run_apart(path, code), run_apart(path, code, FASTOPT_SHIM_SEED="3")
    assert default.stdout.split() == [str(i) for i in (4, *range(64))], default.stderr
    assert seeded.stdout != default.stdout
    assert sorted(map(int, seeded.stdout.split()[1:])) == [*range(64)], seeded.stderr
    assert run_apart(path, code, FASTOPT_SHIM_MULTIPROCESSORS="7").stdout.split()[0] == "7"


def test_portable_switch_of_fibers_gives_the_same(tmp_path):
    portable = load(compile_library(tmp_path, "-DFASTOPT_SHIM_UCONTEXT"))
    for seed in (IN_ORDER, 0, 1):
        portable.fastopt_shim_seed(seed)
        assert sums_are_right(portable)


# Errors that end the process: the misuse, and parts of the message.


@pytest.mark.parametrize(
    ("misuse", "messages"),
    [
        (
            "kBarrierInBranch",
            ["deadlock", "threads 0-15: wait at __syncthreads (", "threads 16-31: wait at __syncwarp"],
        ),
        ("kBarrierAndShuffle", ["deadlock", "threads 16-31: wait at __shfl_sync, mask 0xffffffff"]),
        ("kTwoBarriers", ["deadlock: threads wait at different barriers"]),
        ("kLaneNotInMask", ["lane 4 calls __shfl_sync with mask 0x0000000f, which does not name it"]),
        ("kExitedLaneInMask", ["__ballot_sync with mask 0xffffffff names lanes 0x000000ff, which have exited"]),
        ("kExitUnderShuffle", ["lane 31 exits while lane 0 waits for it at __shfl_down_sync"]),
        ("kTwoCollectives", ["lane 31 at __shfl_sync", "lane 0 at __ballot_sync", "wait for each other"]),
        ("kTwoMasks", ["__any_sync", "mask 0x0000003f", "mask 0xffffffff", "wait for each other"]),
        ("kOddWidth", ["the width of a shuffle is 24"]),
        ("kTrap", ["thread (33, 0, 0): __trap()"]),
        ("kAssert", ["Assertion `thread < 63' failed"]),
        ("kOverrunDynamicShared", ["wrote 0 bytes past the end of the 256 bytes of dynamic shared memory"]),
        ("kUnderrunDynamicShared", ["wrote before the beginning of dynamic shared memory"]),
        ("kMuchStaticShared", ["wrote 768 bytes of static shared memory", "kStaticSharedBytes"]),
    ],
)
def test_misuse_aborts_with_a_message(path, misuse, messages):
    done = run_apart(path, f"library.do_misuse({MISUSES.index(misuse)})")
    assert done.returncode == -6, done.stderr
    for message in messages:
        assert message in done.stderr
    if misuse != "kAssert":
        assert "kernel misuse, block (0, 0, 0)" in done.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("misuse", ["kBarrierInBranch", "kExitedLaneInMask", "kTwoCollectives", "kTwoMasks"])
def test_misuse_aborts_in_any_order(path, misuse, seed):
    done = run_apart(path, f"library.do_misuse({MISUSES.index(misuse)})", FASTOPT_SHIM_SEED=str(seed))
    assert done.returncode == -6, done.stderr
    assert "kernel misuse, block (0, 0, 0)" in done.stderr


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("kWritePastGlobal", "heap-buffer-overflow"),
        ("kReadPastStaticShared", "global-buffer-overflow"),
        ("kReadPastDynamicShared", "use-after-poison"),
        ("kOverrunDynamicShared", "use-after-poison"),
    ],
)
def test_address_sanitizer_finds_accesses_out_of_bounds(sanitized, misuse, message):
    done = run_sanitized(sanitized, f"library.do_misuse({MISUSES.index(misuse)})")
    assert done.returncode != 0
    assert message in done.stderr
    assert "self_test.cu" in done.stderr


def test_address_sanitizer_accepts_right_kernels_on_fibers(sanitized):
    code = "for seed in (-1, 0, 1): library.fastopt_shim_seed(seed); assert sums_are_right(library)"
    done = run_sanitized(sanitized, code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# Launches

KIB = 1024
STATIC = 512  # bytes of static shared memory, with which the shim counts for each kernel
DEFAULT_LIMIT, MAX_LIMIT = 48 * KIB - STATIC, 227 * KIB - STATIC  # of dynamic shared memory


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes", "allowed", "error"),
    [
        ((1, 1, 1), (1, 1, 1), 0, None, SUCCESS),
        ((2, 3, 4), (4, 4, 64), 0, None, SUCCESS),
        ((1, 1, 1), (1024, 1, 1), DEFAULT_LIMIT, None, SUCCESS),
        ((1, 1, 1), (32, 1, 1), MAX_LIMIT, MAX_LIMIT, SUCCESS),
        ((0, 1, 1), (1, 1, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 0), (1, 1, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 1), (0, 1, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 1), (1025, 1, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 33, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 1), (65536, 65536, 1), 0, None, INVALID_CONFIGURATION),  # their product is 0 in 32 bits
        ((2**31, 1, 1), (1, 1, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 65536, 1), (1, 1, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 65536), (1, 1, 1), 0, None, INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 1), 100 * KIB + 1, 100 * KIB, INVALID_VALUE),
        ((1, 1, 1), (1, 1, 1), DEFAULT_LIMIT + 1, None, INVALID_VALUE),
        ((1, 1, 1), (1, 1, 1), 48 * KIB, None, INVALID_VALUE),
        ((1, 1, 1), (1, 1, 1), 0, MAX_LIMIT + 1, INVALID_VALUE),
        ((1, 1, 1), (1, 1, 1), 0, 227 * KIB, INVALID_VALUE),
    ],
)
def test_launch_within_the_limits_runs_and_others_give_errors(path, blocks, threads, shared_bytes, allowed, error):
    # A library keeps what it allowed a kernel, so each case has a process.
    code = f"""
count = ctypes.c_uint()
allowed = {-1 if allowed is None else allowed}
print(library.launch_shape(unsigneds{blocks}, unsigneds{threads}, {shared_bytes}, allowed, ctypes.byref(count)))
print(count.value)
"""
    done = run_apart(path, code)
    n = math.prod(blocks) * math.prod(threads)
    assert done.stdout.split() == [str(error), str(n if error == SUCCESS else 0)], done.stderr


def test_dynamic_shared_memory_above_the_default_limit_needs_the_attribute(path):
    code = """
shape, count = unsigneds(1, 1, 1), ctypes.c_uint()
fixed, limit = ctypes.c_int(), ctypes.c_int()

def limits():
    assert library.shared_bytes(ctypes.byref(fixed), ctypes.byref(limit)) == SUCCESS
    return fixed.value, limit.value

assert limits() == (STATIC, DEFAULT_LIMIT)
for shared_bytes, allowed, error in [
    (DEFAULT_LIMIT, -1, SUCCESS),
    (DEFAULT_LIMIT + 1, -1, INVALID_VALUE),
    (48 * KIB, 64 * KIB, SUCCESS),
    (64 * KIB, -1, SUCCESS),
    (64 * KIB + 1, -1, INVALID_VALUE),
    (0, MAX_LIMIT + 1, INVALID_VALUE),
    (64 * KIB, 64 * KIB, SUCCESS),
]:
    assert library.launch_shape(shape, shape, shared_bytes, allowed, ctypes.byref(count)) == error
    assert limits() == (STATIC, DEFAULT_LIMIT if count.value == 1 else 64 * KIB)
print(count.value)
"""
    done = run_apart(path, code)
    assert done.stdout.split() == ["4"], done.stderr


def test_changes_of_a_kernels_limit_are_counted(library):
    shape, count = unsigneds(1, 1, 1), ctypes.c_uint()
    counts = []
    for allowed in (MAX_LIMIT, MAX_LIMIT, 64 * KIB, MAX_LIMIT, MAX_LIMIT + 1, MAX_LIMIT):
        library.launch_shape(shape, shape, 0, allowed, ctypes.byref(count))
        counts.append(library.fastopt_shim_changed_limits())
    assert [n - counts[0] for n in counts] == [0, 0, 1, 2, 2, 2]


def test_injected_launch_failure_occurs_once(library):
    shape, count = unsigneds(1, 1, 1), ctypes.c_uint()
    library.fastopt_shim_fail_next(719)
    errors = [library.launch_shape(shape, shape, 0, -1, ctypes.byref(count)) for _ in range(2)]
    assert errors == [719, SUCCESS]
    assert count.value == 1
    assert library.error_name(719) == b"cudaErrorLaunchFailure"


@pytest.mark.parametrize(("blocks", "threads"), [((3, 2, 2), (5, 3, 2)), ((7, 1, 1), (64, 1, 1))])
def test_each_index_comes_once(library, blocks, threads):
    n = math.prod(blocks) * math.prod(threads)
    for seed in (IN_ORDER, *SEEDS):
        library.fastopt_shim_seed(seed)
        ranks = ints(*[0] * n)
        assert library.index_all(unsigneds(*blocks), unsigneds(*threads), ranks) == SUCCESS
        assert list(ranks) == [1] * n


def test_arguments_are_copied_at_launch(library):
    read = ints(*[0] * 64)
    assert library.copy_table(2, 32, read) == SUCCESS
    assert list(read) == [1] * 64


def test_shared_memory_is_garbage_when_a_block_begins(library):
    found = (ctypes.c_float * (2 * 64 * 3))()
    assert library.look(3, found) == SUCCESS
    assert all(map(math.isnan, found))


def test_thread_local_variables_of_the_host_outlast_a_launch(path):
    code = "before = library.launches_here(); sums_are_right(library); print(before, library.launches_here())"
    assert run_apart(path, code).stdout.split() == ["0", "1"]


def test_host_threads_launch_at_the_same_time(library):
    library.fastopt_shim_seed(1)
    right = []

    def launch():
        right.extend([sums_are_right(library, threads=threads) for threads in (32, 64, 256) * 10])

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 120


def test_forked_child_launches(path):
    code = """
stop = threading.Event()

def launch():
    while not stop.is_set(): assert sums_are_right(library)

thread = threading.Thread(target=launch)
thread.start()
statuses = []
for _ in range(20):
    child = os.fork()
    if child == 0: os._exit(0 if sums_are_right(library) else 1)
    statuses.append(os.waitpid(child, 0)[1])
stop.set()
thread.join()
assert statuses == [0] * 20 and sums_are_right(library), statuses
"""
    done = run_apart(path, code, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr


# Collectives and atomics

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
