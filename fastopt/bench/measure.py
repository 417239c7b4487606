"""Clocks, a plain copy to hold times against, peak memory, and statistics."""

import contextlib
import ctypes
import gc
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from .._build import native
from . import machine

STRETCH_S = 30e-3  # of timed calls, after one untimed call
MAX_CALLS = 20_000
MIN_ROUNDS, MAX_ROUNDS = 3, 41
COPY_BYTES = 2**29  # a larger copy's time is that of so many bytes, scaled
UNKNOWN_CACHE_BYTES = 2**26


def spread(samples):
    """Median, 10th and 90th percentile, interpolated."""
    return dict(zip(("median", "p10", "p90"), np.percentile(samples, (50, 10, 90)).tolist(), strict=True))


class CpuClock:
    """Repeats a call for a stretch: what fits in the caches is found there."""

    def __init__(self, stretch_s=None):
        self._stretch_s = stretch_s or STRETCH_S

    def n_calls(self, call):
        """The number of calls that make a turn."""
        stretch_s, n_calls = 0.0, 0
        while stretch_s < self._stretch_s / 10 and n_calls < MAX_CALLS:
            n_calls = max(1, 4 * n_calls)
            stretch_s = self.time(call, n_calls)[0] * n_calls
        return min(MAX_CALLS, max(1, round(self._stretch_s * n_calls / stretch_s)))

    def time(self, call, n_calls):
        """Seconds a call, and seconds of the host a call where they differ."""
        call()
        start = time.perf_counter()
        for _ in range(n_calls):
            call()
        return (time.perf_counter() - start) / n_calls, None


class ColdClock:
    """Times single calls, each after the caches were overwritten: nothing that it reads is found there."""

    def __init__(self):
        n_bytes, n_free = 5 * (machine.last_cache_bytes() or UNKNOWN_CACHE_BYTES) // 4, available_bytes("cpu")
        self._flush = torch.zeros(n_bytes if n_free is None else min(n_bytes, n_free // 4), dtype=torch.uint8)

    def n_calls(self, _call):
        return 1

    def time(self, call, _n_calls):
        self._flush.add_(1)  # not zero_: memset writes past the caches
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, None


class CudaClock:
    """Times single calls by events, each with the L2 cache overwritten before it.

    Overwriting also keeps the device busy while the host launches the call, so launches that the host can hide are
    hidden, as in a training step. The host's time is that of the call itself, which waits for nothing.
    """

    def __init__(self):
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(2**28, 4 * l2_bytes), dtype=torch.uint8, device="cuda")

    def n_calls(self, call):
        return min(50, max(3, round(STRETCH_S / max(self.time(call, 2)))))

    def time(self, call, n_calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        torch.cuda.synchronize()
        device_s, host_s = [], []
        for _ in range(n_calls):
            self._flush.zero_()
            begin.record()
            start = time.perf_counter()
            call()
            host_s.append(time.perf_counter() - start)
            end.record()
            end.synchronize()  # keeps the queue short, so that the host never waits for a place in it
            device_s.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(device_s), statistics.median(host_s)


def interleaved(calls, clock, n_rounds=None, budget_s=4.0):
    """Times of the ``calls``, by name, that take turns; every other round in reverse.

    There are ``n_rounds``, or as many as ``budget_s`` has time for, within limits. Of each name and round
    (seconds, host seconds or None).
    """
    n_calls = {name: clock.n_calls(call) for name, call in calls.items()}
    times, start = {name: [] for name in calls}, time.perf_counter()
    for index in range(n_rounds or MAX_ROUNDS):
        if n_rounds is None and index >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            break
        for name in list(calls)[:: -1 if index % 2 else 1]:
            times[name].append(clock.time(calls[name], n_calls[name]))
    return times


class Copy:
    """A plain copy that moves ``bytes_moved``: half of them read, half written."""

    def __init__(self, bytes_moved, device):
        self.bytes_copied = min(bytes_moved, COPY_BYTES)
        self.scale = bytes_moved / self.bytes_copied
        self._from = torch.ones(self.bytes_copied // 2, dtype=torch.uint8, device=device)
        self._to = torch.ones_like(self._from)

    def __call__(self):
        self._to.copy_(self._from)


def peak_extra_bytes(started, device):
    """The most memory that one call holds at once beyond its inputs, gradient included; None where it is unknown.

    On CUDA that which torch's allocator has handed out. On the CPU resident memory, whoever allocated it, from the
    high-water mark that Linux keeps; after ``return_memory_at_once``.
    """
    started.call()
    started.reset()
    gc.collect()
    native.empty_cache()  # or the gradient would be found in memory that is resident already
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        started.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, KeyError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _bytes("/proc/self/status", "VmRSS")
        started.call()
        return max(0, _bytes("/proc/self/status", "VmHWM") - before)


def return_memory_at_once():
    """Have glibc map every large array afresh and unmap it when freed, so that resident memory follows the arrays."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**17)


def available_bytes(device):
    """Memory that a case may take, or None where it is unknown."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError, KeyError):
        return _bytes("/proc/meminfo", "MemAvailable")


def _bytes(file, field):
    return 1024 * int(dict(line.split(":", 1) for line in Path(file).read_text().splitlines())[field].split()[0])
