"""Runs each case in processes of its own, and puts the results together.

A process of its own, because earlier work changes the times. glibc serves an array from a hole in its heap if one is
large enough, and page faults are most of the time of a large array that is fresh: holes that earlier cases leave behind
lasting objects, torch.compile's for one, make torch's own losses up to five times as fast. So compiled providers are
timed in another process, beside fastopt once more, and peak memory is found in a third. On CUDA, where torch's
allocator keeps freed memory anyway, one process does everything.
"""

import functools
import math
import multiprocessing
import os
import time
from dataclasses import dataclass

import torch

from . import measure, work
from .providers import NotOffered, providers_for

COPY = "copy"
MEMORY_FROM_BYTES = 8e6  # smaller peaks are lost among those of the interpreter
COMPILE_OPTIONS = {"loss": "loss", "optimizer": "step"}  # the value of --compile for each kind of case


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    n_threads: int = 1
    n_rounds: int | None = None
    is_quick: bool = False
    compile: str = "loss"
    timeout_s: float = 600.0
    is_cold: bool = False  # the caches are overwritten before further calls


def run(case, settings):
    """Everything found about one case, as a dict of JSON's types."""
    providers = providers_for(case, settings.device)
    plain = [provider.name for provider in providers if not provider.compiles]
    compiling, option = [provider.name for provider in providers if provider.compiles], COMPILE_OPTIONS[case.kind]
    entries = {name: _not_run(name, f"runs torch.compile: --compile {option}") for name in compiling}
    if settings.compile not in ("all", option):
        compiling = []
    if settings.device == "cuda":
        plain, compiling = plain + compiling, []
    found, n_rounds = _times(case, settings, plain)
    entries |= found
    if compiling:
        beside, _ = _times(case, settings, [*compiling, "fastopt"])
        our_us = beside["fastopt"].get("median_us")
        entries |= {name: beside[name] | {"fastopt_beside_us": our_us} for name in compiling}
    if settings.device == "cpu" and case.bytes_moved >= MEMORY_FROM_BYTES:
        timed = [name for name in plain + compiling if entries[name]["status"] == "timed"]
        extra_bytes, _ = _in_child(case, settings, timed, memory)
        for name, n_bytes in (extra_bytes or {}).items():
            entries[name]["extra_bytes"] = n_bytes
    return {
        "name": case.name,
        "kind": case.kind,
        "bytes_moved": case.bytes_moved,
        "working": case.working,
        "n_rounds": n_rounds,
        "copy": entries.get(COPY),
        "providers": [entries[provider.name] for provider in providers],
    }


def _times(case, settings, names):
    """An entry of each provider, and the number of rounds."""
    outcome, lost = _in_child(case, settings, names, times)
    entries, n_rounds = outcome or ({}, 0)
    return lost | entries, n_rounds


def _not_run(name, reason):
    return {"provider": name, "status": "not run", "reason": reason}


def _in_child(case, settings, names, measured):
    """(outcome, entries of the lost): ``measured`` in a fresh process, again without a provider that made it end."""
    lost = {}
    while names:
        outcome, at, reason = _one_child(case, settings, names, measured)
        if outcome is not None:
            return outcome, lost
        lost |= {name: _not_run(name, reason) for name in names if at in (name, None)}
        names = [name for name in names if name not in lost]
    return None, lost


def _one_child(case, settings, names, measured):
    """(outcome or None, the provider whose turn it was or None, the reason or None)."""
    context = _context(settings.device)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_child, args=(sender, case, settings, names, measured))
    child.start()
    sender.close()
    deadline, at = time.monotonic() + settings.timeout_s, None
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            kind, value = receiver.recv()
            if kind != "at":
                return (value, None, None) if kind == "done" else (None, at, value)
            at = value
        return None, at, f"no result in {settings.timeout_s:.0f} s"
    except EOFError:
        child.join()
        return None, at, f"its process ended with status {child.exitcode}"
    finally:
        receiver.close()
        child.join(5)
        child.kill()
        child.join()


@functools.cache
def _context(device):
    """Children start from a process that has imported torch, as far as optimizers do, and used nothing of it."""
    spawn = multiprocessing.get_context("spawn")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return spawn
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more processes would compete with those timed
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a device must not start CUDA
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    if device == "cuda":
        child = context.Process(target=torch.cuda.synchronize)
        child.start()
        child.join()
        if child.exitcode != 0:  # something that was imported has started CUDA, and a fork cannot go on with it
            return spawn
    return context


# In the child.


def _run_child(connection, case, settings, names, measured):
    """Send ("at", name) before each provider's turn, then ("done", what ``measured`` returns) or ("failed", why)."""
    torch.set_num_threads(settings.n_threads)
    wanted = [provider for provider in providers_for(case, settings.device) if provider.name in names]
    try:
        connection.send(("done", measured(case, settings, wanted, lambda name: connection.send(("at", name)))))
    except Exception as error:
        connection.send(("failed", _one_line(error)))
    connection.close()


def times(case, settings, providers, announce=lambda name: None):
    """(entries by name, n_rounds): check every provider, then time those that are right beside a plain copy."""
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
        samples = measure.interleaved(calls, clock, settings.n_rounds, 0.5 if settings.is_quick else 4.0)
        for name, pairs in samples.items():
            scale = 1e6 * (copy.scale if name == COPY else 1)
            spread = measure.spread([scale * seconds for seconds, _ in pairs])
            entries[name] |= {f"{prefix}{key}_us": us for key, us in spread.items()}
            if on_cuda:
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


def _one_line(error):
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    return first if isinstance(error, NotOffered) else f"{type(error).__name__}: {first}".rstrip(": ")
