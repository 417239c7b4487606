"""The shim that runs CUDA kernels on the CPU: it computes a device's results, and detects errors of kernels."""

import ctypes
import math
import threading

import pytest

from paths import CXX
from shim_self_test import (
    DEFAULT_LIMIT,
    IN_ORDER,
    INVALID_CONFIGURATION,
    INVALID_VALUE,
    KIB,
    MAX_LIMIT,
    SEEDS,
    SUCCESS,
    compile_library,
    ints,
    load,
    run_apart,
    sums_are_right,
    unsigneds,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CXX is None, reason="needs g++")]


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


def test_seed_and_multiprocessors_come_from_the_environment(self_test):
    code = "order = ints(*[-1] * 64); library.list_order(1, 64, order); print(library.multiprocessors(), *order)"
    default, seeded = run_apart(self_test, code), run_apart(self_test, code, FASTOPT_SHIM_SEED="3")
    assert default.stdout.split() == [str(i) for i in (4, *range(64))], default.stderr
    assert seeded.stdout != default.stdout
    assert sorted(map(int, seeded.stdout.split()[1:])) == [*range(64)], seeded.stderr
    assert run_apart(self_test, code, FASTOPT_SHIM_MULTIPROCESSORS="7").stdout.split()[0] == "7"


def test_portable_switch_of_fibers_gives_the_same(tmp_path):
    portable = load(compile_library(tmp_path, "-DFASTOPT_SHIM_UCONTEXT"))
    for seed in (IN_ORDER, 0, 1):
        portable.fastopt_shim_seed(seed)
        assert sums_are_right(portable)


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
def test_launch_within_the_limits_runs_and_others_give_errors(self_test, blocks, threads, shared_bytes, allowed, error):
    # A library keeps what it allowed a kernel, so each case has a process.
    code = f"""
count = ctypes.c_uint()
allowed = {-1 if allowed is None else allowed}
print(library.launch_shape(unsigneds{blocks}, unsigneds{threads}, {shared_bytes}, allowed, ctypes.byref(count)))
print(count.value)
"""
    done = run_apart(self_test, code)
    n = math.prod(blocks) * math.prod(threads)
    assert done.stdout.split() == [str(error), str(n if error == SUCCESS else 0)], done.stderr


def test_dynamic_shared_memory_above_the_default_limit_needs_the_attribute(self_test):
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
    done = run_apart(self_test, code)
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


def test_thread_local_variables_of_the_host_outlast_a_launch(self_test):
    code = "before = library.launches_here(); sums_are_right(library); print(before, library.launches_here())"
    assert run_apart(self_test, code).stdout.split() == ["0", "1"]


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


def test_forked_child_launches(self_test):
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
    done = run_apart(self_test, code, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
