"""Runs each case in processes of its own, and puts together what they found.

A process of its own, because what ran before changes what is measured. glibc serves an array from a hole in its heap if
one is large enough, and page faults are most of the time of a large array that is fresh: holes that earlier cases leave
behind lasting objects, torch.compile's for one, make torch's own losses up to five times as fast. So what is compiled
is timed in another process, beside fastopt once more, and peak memory is found in a third. On CUDA, where torch's
allocator keeps what is freed anyway, one process does everything.
"""

import dataclasses
import functools
import multiprocessing
import os
import time
from dataclasses import dataclass

from . import worker
from .providers import providers_for

# Smaller peaks are lost among those of the interpreter.
MEMORY_FROM_BYTES = 8e6
COMPILE_OPTIONS = {"loss": "loss", "optimizer": "step"}  # what asks for torch.compile of each kind of case


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    n_threads: int = 1
    n_rounds: int | None = None
    is_quick: bool = False
    compile: str = "loss"
    timeout_s: float = 600.0
    is_cold: bool = False

    @property
    def budget_s(self):
        return 0.5 if self.is_quick else 4.0

    def compiles(self, kind):
        return self.compile == "all" or self.compile == COMPILE_OPTIONS[kind]


def run(case, settings):
    """Everything found about one case, as a dict of JSON's types."""
    known = providers_for(case, settings.device)
    installed = [provider for provider in known if provider.is_installed]
    plain = [provider.name for provider in installed if not provider.compiles]
    compiling = [provider.name for provider in installed if provider.compiles]
    entries, skipped = {}, {}
    if not settings.compiles(case.kind):
        skipped = dict.fromkeys(compiling, f"runs torch.compile: --compile {COMPILE_OPTIONS[case.kind]}")
        compiling = []

    together = settings.device == "cuda"
    n_rounds = _times(case, settings, plain + compiling * together, entries)
    if compiling and not together:
        beside = {}
        _times(case, settings, [*compiling, "fastopt"], beside)
        ours = beside.pop("fastopt")
        beside.pop(worker.COPY, None)
        for entry in beside.values():
            entry["fastopt_beside_us"] = ours.get("median_us")
        entries |= beside
    entries |= {name: _not_run(name, reason) for name, reason in skipped.items()}

    if settings.device == "cpu" and case.bytes_moved >= MEMORY_FROM_BYTES:
        timed = [name for name in plain + compiling if entries[name]["status"] == "timed"]
        outcome, _ = _in_child(_job(case, settings, timed, "memory"), settings.timeout_s)
        for name, extra_bytes in (outcome or {}).items():
            entries[name]["extra_bytes"] = extra_bytes
    copy = entries.pop(worker.COPY, None)
    return {
        "name": case.name,
        "kind": case.kind,
        "bytes_moved": case.bytes_moved,
        "working": case.working,
        "n_rounds": n_rounds,
        "copy": copy,
        "providers": [entries[provider.name] for provider in installed],
    }


def _times(case, settings, names, entries):
    """Fill in ``entries`` and return the number of rounds."""
    outcome, lost = _in_child(_job(case, settings, names, "times"), settings.timeout_s)
    found, n_rounds = outcome or ({}, 0)
    entries.update(found)
    entries.update({name: _not_run(name, lost.get(name) or lost.get(None)) for name in names if name not in found})
    return n_rounds


def _job(case, settings, names, wants):
    limits = settings.n_threads, settings.n_rounds, settings.budget_s, settings.is_cold
    return worker.Job(case, settings.device, tuple(names), wants, *limits)


def _not_run(name, reason):
    return {"provider": name, "status": "not run", "reason": reason}


def _in_child(job, timeout_s):
    """Do a job in a fresh process, and again without a provider that brought it down.

    Returns:
        (outcome or None, reasons): why each lost provider did not run; under None why nothing did.
    """
    lost = {}
    while job.names:
        outcome, at, reason = _one_child(job, timeout_s)
        if outcome is not None:
            return outcome, lost
        lost[at] = reason
        if at not in job.names:
            break
        job = dataclasses.replace(job, names=tuple(name for name in job.names if name != at))
    return None, lost


def _one_child(job, timeout_s):
    """(outcome or None, the provider whose turn it was or None, the reason or None)."""
    context = _context(job.device)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=worker.run, args=(job, sender))
    child.start()
    sender.close()
    deadline, at = time.monotonic() + timeout_s, None
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            kind, value = receiver.recv()
            if kind == "done":
                return value, None, None
            if kind == "failed":
                return None, at, value
            at = value
        return None, at, f"no result in {timeout_s:.0f} s"
    except EOFError:
        child.join()
        return None, at, f"its process ended with status {child.exitcode}"
    finally:
        receiver.close()
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()


@functools.cache
def _context(device):
    """Children start from a process that has imported torch, as far as optimizers do, and used nothing of it."""
    spawn = multiprocessing.get_context("spawn")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return spawn
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more processes would compete with what is timed
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a device must not start CUDA
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__, "torch._dynamo"])
    if device == "cuda":
        child = context.Process(target=worker.touch_cuda)
        child.start()
        child.join()
        if child.exitcode != 0:  # something that was imported has started CUDA, and a fork cannot go on with it
            return spawn
    return context
