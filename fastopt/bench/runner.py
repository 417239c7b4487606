"""Runs each case in processes of its own, and puts the results together.

A process of its own, because earlier work changes the times. glibc serves an array from a hole in its heap if one is
large enough, and page faults are most of the time of a large array that is fresh: holes that earlier cases leave behind
lasting objects, torch.compile's for one, make torch's own losses up to five times as fast. So compiled providers are
timed in another process, beside fastopt once more, and peak memory is found in a third. On CUDA, where torch's
allocator keeps freed memory anyway, one process does everything.
"""

import functools
import multiprocessing
import os
import time

from . import worker
from .providers import providers_for

MEMORY_FROM_BYTES = 8e6  # smaller peaks are lost among those of the interpreter
COMPILE_OPTIONS = {"loss": "loss", "optimizer": "step"}  # the value of --compile for each kind of case


def run(case, settings):
    """Everything found about one case, as a dict of JSON's types."""
    installed = [provider for provider in providers_for(case, settings.device) if provider.is_installed]
    plain = [provider.name for provider in installed if not provider.compiles]
    compiling, skipped, option = [p.name for p in installed if p.compiles], [], COMPILE_OPTIONS[case.kind]
    if settings.compile not in ("all", option):
        compiling, skipped = [], compiling

    if settings.device == "cuda":
        entries, n_rounds = _times(case, settings, plain + compiling)
    else:
        entries, n_rounds = _times(case, settings, plain)
        beside, _ = _times(case, settings, [*compiling, "fastopt"]) if compiling else ({}, 0)
        entries |= {
            name: beside[name] | {"fastopt_beside_us": beside["fastopt"].get("median_us")} for name in compiling
        }
        if case.bytes_moved >= MEMORY_FROM_BYTES:
            timed = [name for name in plain + compiling if entries[name]["status"] == "timed"]
            extra_bytes, _ = _in_child(case, settings, timed, worker.memory)
            for name, n_bytes in (extra_bytes or {}).items():
                entries[name]["extra_bytes"] = n_bytes
    entries |= {name: _not_run(name, f"runs torch.compile: --compile {option}") for name in skipped}
    return {
        "name": case.name,
        "kind": case.kind,
        "bytes_moved": case.bytes_moved,
        "working": case.working,
        "n_rounds": n_rounds,
        "copy": entries.get(worker.COPY),
        "providers": [entries[provider.name] for provider in installed],
    }


def _times(case, settings, names):
    """An entry of each provider, and the number of rounds."""
    outcome, lost = _in_child(case, settings, names, worker.times)
    entries, n_rounds = outcome or ({}, 0)
    return {name: _not_run(name, lost.get(name) or lost.get(None)) for name in names} | entries, n_rounds


def _not_run(name, reason):
    return {"provider": name, "status": "not run", "reason": reason}


def _in_child(case, settings, names, measured):
    """``measured`` in a fresh process, and again without a provider that made the process end.

    Returns:
        (outcome or None, reasons): why each lost provider did not run; under None why nothing did.
    """
    lost = {}
    while names:
        outcome, at, reason = _one_child(case, settings, names, measured)
        if outcome is not None:
            return outcome, lost
        lost[at] = reason
        if at not in names:
            break
        names = [name for name in names if name != at]
    return None, lost


def _one_child(case, settings, names, measured):
    """(outcome or None, the provider whose turn it was or None, the reason or None)."""
    context = _context(settings.device)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=worker.run, args=(sender, case, settings, names, measured))
    child.start()
    sender.close()
    deadline, at = time.monotonic() + settings.timeout_s, None
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            kind, value = receiver.recv()
            if kind == "done":
                return value, None, None
            if kind == "failed":
                return None, at, value
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
    context.set_forkserver_preload([worker.__name__, "torch._dynamo"])
    if device == "cuda":
        child = context.Process(target=worker.touch_cuda)
        child.start()
        child.join()
        if child.exitcode != 0:  # something that was imported has started CUDA, and a fork cannot go on with it
            return spawn
    return context
