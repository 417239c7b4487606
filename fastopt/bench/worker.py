"""Checks and times the providers of one case, in a process that has done nothing else."""

import math
from dataclasses import dataclass

import torch

from . import measure, work
from .providers import NotOffered, providers_for

COPY = "copy"


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    n_threads: int = 1
    n_rounds: int | None = None
    is_quick: bool = False
    compile: str = "loss"
    timeout_s: float = 600.0
    is_cold: bool = False  # the caches are overwritten before further calls


def run(connection, case, settings, names, measured):
    """Send ("at", name) before each provider's turn, then ("done", what ``measured`` returns) or ("failed", why)."""
    torch.set_num_threads(settings.n_threads)
    wanted = [provider for provider in providers_for(case, settings.device) if provider.name in names]
    try:
        connection.send(("done", measured(case, settings, wanted, lambda name: connection.send(("at", name)))))
    except Exception as error:
        connection.send(("failed", _one_line(error)))
    connection.close()


def times(case, settings, providers, announce=lambda name: None):
    """Check every provider, then time those that are right beside a plain copy.

    Returns:
        (entries, n_rounds): entries is a dict of each provider's name and of "copy".
    """
    ready, on_cuda = work.prepare(case, settings.device), settings.device == "cuda"
    entries, started = {}, {}
    for provider in providers:
        announce(provider.name)
        entries[provider.name] = _check(ready, provider, started)
    announce(None)
    copy = measure.Copy(case.bytes_moved, settings.device)
    calls = {name: its.call for name, its in started.items()} | {COPY: copy}
    entries[COPY] = {"provider": COPY, "status": "timed"}
    clocks = {"": measure.CudaClock() if on_cuda else measure.CpuClock()}
    if settings.is_cold:
        clocks["cold_"] = measure.ColdClock()
    for prefix, clock in clocks.items():
        budget_s = 0.5 if settings.is_quick else 4.0
        samples = measure.interleaved(calls, clock, settings.n_rounds, budget_s)
        for name, pairs in samples.items():
            scale = 1e6 * (copy.scale if name == COPY else 1)
            spread = measure.spread([scale * seconds for seconds, _ in pairs])
            entries[name] |= {f"{prefix}{key}_us": us for key, us in spread.items()}
            if pairs[0][1] is not None:
                entries[name]["host_us"] = measure.spread([1e6 * host_s for _, host_s in pairs])["median"]
    for name in calls:
        entries[name]["gb_per_s"] = case.bytes_moved / entries[name]["median_us"] / 1e3
        entries[name]["of_copy"] = entries[COPY]["median_us"] / entries[name]["median_us"]
        if on_cuda and name != COPY:
            entries[name]["extra_bytes"] = measure.peak_extra_bytes(started[name], "cuda")
    return entries, len(samples[COPY])


def _check(ready, provider, started):
    """A provider's entry before it is timed; its call goes into ``started`` if it is to be timed."""
    entry = {"provider": provider.name, "status": "not run", "reason": None}
    try:
        available = measure.available_bytes(ready.device)
        if available is not None and available < 1.2 * ready.bytes_each:
            raise MemoryError(f"needs {ready.bytes_each / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
        its = ready.start(provider)
        error, allowed = ready.check(its)
    except Exception as raised:
        if "CUDA error" in str(raised):  # every later call on the device may fail too, of whatever provider
            raise
        return entry | {"reason": _one_line(raised)}
    entry |= {"error": error if math.isfinite(error) else None, "allowed": allowed}
    if not error <= allowed:  # as NaN is not
        return entry | {"status": "wrong", "reason": f"differs by {error:.2g}, {allowed:.2g} allowed"}
    started[provider.name] = its
    return entry | {"status": "timed"}


def memory(case, settings, providers, announce):
    """Peak extra bytes of each provider, one after another."""
    measure.return_memory_at_once()
    ready, extra_bytes = work.prepare(case, settings.device), {}
    for provider in providers:
        announce(provider.name)
        started = ready.start(provider)
        started.call()
        extra_bytes[provider.name] = measure.peak_extra_bytes(started, settings.device)
        del started  # before the next is made
    return extra_bytes


def touch_cuda():
    torch.zeros(1, device="cuda")


def _one_line(error):
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    return first if isinstance(error, NotOffered) else f"{type(error).__name__}: {first}".rstrip(": ")
