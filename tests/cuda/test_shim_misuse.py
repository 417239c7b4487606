"""Errors of kernels that the shim detects: the process ends with a message."""

import pytest

from paths import CXX, SHIM
from shim_self_test import run_apart, run_sanitized

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CXX is None, reason="needs g++")]
MISUSES = [
    name.strip() for name in (SHIM / "misuse.cu").read_text().split("enum Misuse : int {")[1].split("}")[0].split(",")
]


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
def test_misuse_aborts_with_a_message(self_test, misuse, messages):
    done = run_apart(self_test, f"library.do_misuse({MISUSES.index(misuse)})")
    assert done.returncode == -6, done.stderr
    for message in messages:
        assert message in done.stderr
    if misuse != "kAssert":
        assert "kernel misuse, block (0, 0, 0)" in done.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("misuse", ["kBarrierInBranch", "kExitedLaneInMask", "kTwoCollectives", "kTwoMasks"])
def test_misuse_aborts_in_any_order(self_test, misuse, seed):
    done = run_apart(self_test, f"library.do_misuse({MISUSES.index(misuse)})", FASTOPT_SHIM_SEED=str(seed))
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
    assert "misuse.cu" in done.stderr


def test_address_sanitizer_accepts_right_kernels_on_fibers(sanitized):
    code = "for seed in (-1, 0, 1): library.fastopt_shim_seed(seed); assert sums_are_right(library)"
    done = run_sanitized(sanitized, code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
