"""Checks and times the providers of one case, in a process that has done nothing else."""

import math
from dataclasses import dataclass

import torch

from . import measure, work
from .providers import NotOffered, providers_for

COPY = "copy"


@dataclass(frozen=True)
class Job:
    case: object
    device: str
    names: tuple  # of the providers
    wants: str = "times"  # or "memory"
    n_threads: int = 1
    n_rounds: int | None = None
    budget_s: float = 4.0
    is_cold: bool = False  # the caches are overwritten before further calls


def run(job, connection):
    """Do a job and send ("at", name) before each provider's turn, then ("done", outcome) or ("failed", why)."""
    torch.set_num_threads(job.n_threads)
    wanted = [provider for provider in providers_for(job.case, job.device) if provider.name in job.names]
    announce = lambda name: connection.send(("at", name))  # noqa: E731
    try:
        if job.wants == "memory":
            outcome = memory(job.case, job.device, wanted, announce)
        else:
            outcome = times(job.case, job.device, wanted, announce, job.n_rounds, job.budget_s, job.is_cold)
        connection.send(("done", outcome))
    except Exception as error:
        connection.send(("failed", _one_line(error)))
    connection.close()


def times(case, device, providers, announce=lambda name: None, n_rounds=None, budget_s=4.0, is_cold=False):
    """Check every provider, then time those that are right beside a plain copy; cold calls too if ``is_cold``.

    Returns:
        (entries, n_rounds): entries is a dict of each provider's name and of "copy".
    """
    ready = work.prepare(case, device)
    entries, started = {}, {}
    for provider in providers:
        announce(provider.name)
        entries[provider.name], started[provider.name] = _checked(ready, provider, device)
    calls = {name: its.call for name, its in started.items() if its}
    copy = calls[COPY] = measure.Copy(case.bytes_moved, device)
    announce(None)
    samples = measure.interleaved(calls, measure.clock_for(device), n_rounds, budget_s)
    copy_s = copy.scale * measure.spread([seconds for seconds, _ in samples[COPY]])["median"]
    for name, pairs in samples.items():
        scale = copy.scale if name == COPY else 1
        seconds = measure.spread([scale * seconds for seconds, _ in pairs])
        entry = entries.setdefault(name, {"provider": name, "status": "timed"})
        entry.update({f"{key}_us": value * 1e6 for key, value in seconds.items()})
        entry["gb_per_s"] = case.bytes_moved / seconds["median"] / 1e9
        entry["of_copy"] = copy_s / seconds["median"]
        if pairs[0][1] is not None:
            entry["host_us"] = measure.spread([host for _, host in pairs])["median"] * 1e6
    if is_cold:
        for name, pairs in measure.interleaved(calls, measure.ColdClock(), n_rounds, budget_s).items():
            scale = copy.scale if name == COPY else 1
            seconds = measure.spread([scale * seconds for seconds, _ in pairs])
            entries[name] |= {f"cold_{key}_us": value * 1e6 for key, value in seconds.items()}
    if device == "cuda":
        for name, its in started.items():
            if its:
                entries[name]["extra_bytes"] = measure.peak_extra_bytes(its, device)
    return entries, len(samples[COPY])


def _checked(ready, provider, device):
    """A provider's entry before it is timed, and its call if it is to be timed."""
    entry = {"provider": provider.name, "status": "not run", "reason": None}
    try:
        available = measure.available_bytes(device)
        if available is not None and available < 1.2 * ready.bytes_each:
            raise MemoryError(f"needs {ready.bytes_each / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
        started = ready.start(provider)
        verdict = ready.check(started)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        if _device_is_lost(error):
            raise
        entry["reason"] = _one_line(error)
        return entry, None
    entry |= {"error": verdict.error if math.isfinite(verdict.error) else None, "allowed": verdict.allowed}
    if not verdict.ok:
        reason = f"differs by {verdict.error:.2g}, {verdict.allowed:.2g} allowed"
        return entry | {"status": "wrong", "reason": reason}, None
    return entry | {"status": "timed"}, started


def memory(case, device, providers, announce=lambda name: None):
    """Peak extra bytes of each provider, one after another."""
    measure.return_memory_at_once()
    ready = work.prepare(case, device)
    outcome = {}
    for provider in providers:
        announce(provider.name)
        started = ready.start(provider)
        started.call()
        outcome[provider.name] = measure.peak_extra_bytes(started, device)
        del started
    return outcome


def touch_cuda():
    torch.zeros(1, device="cuda")


def _one_line(error):
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    return first if isinstance(error, NotOffered) else f"{type(error).__name__}: {first}".rstrip(": ")


def _device_is_lost(error):
    """After some errors every later call on the device fails too, whoever makes it."""
    return "CUDA error" in str(error)
