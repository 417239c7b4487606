"""``python -m fastopt bench sweep``: finds rows, many small and large ones, in which fastopt is slower than torch."""

import argparse
import random
import time

import torch

from .._arguments import at_least, non_negative
from . import cases, measure, work
from .providers import NotOffered, providers_for

BAR = 0.95  # torch's time over fastopt's
NOISE_US = 2.0
MIN_ROW_S, MAX_ROW_S = 0.01, 1.0
N_TRIES, N_ROUNDS_AGAIN, AGAIN_S = 3, 11, 0.5  # of rows that look slow: in all, then in each try, for so long at least
SECONDS, QUICK_SECONDS, QUICK_BYTES = 600.0, 60.0, 8e6

HELP = "look for anything that is slower than torch; exit with 1 if something is"
DESCRIPTION = f"""\
Time every optimizer and loss over many options, sizes, layouts, dtypes and numbers of threads, beside the fastest of
torch's eager implementations (for-loop, foreach, fused). Prints the rows that fall short: fastopt takes more than
torch's time / {BAR}, and over {NOISE_US:g} us more. Such a row is made and measured again, longer, {N_TRIES - 1} times.
It is printed if it falls short each time, with the bytes that it must move and the rate at which it and a plain copy
move them: where the rates are the same, no kernel can do better. Rows are taken in a random order, so that a short
sweep is a sample. Exits with 1 if a row falls short, with 3 if fastopt does not run."""


class Times(dict):
    """Median microseconds of one row by provider."""

    @property
    def torch(self):
        """The fastest of torch's implementations."""
        return min((name for name in self if name.startswith("torch")), key=self.get)

    @property
    def ratio(self):
        return self[self.torch] / self["fastopt"]

    @property
    def is_slow(self):
        return self.ratio < BAR and self["fastopt"] - self[self.torch] > NOISE_US


def add_arguments(parser):
    """The sweep's arguments on ``parser``; those it shares with the benchmark may stand before the command too."""
    parser.description = DESCRIPTION
    parser.set_defaults(bench_command=run)
    shared = dict(default=argparse.SUPPRESS)
    only = 'rows whose name has TEXT, with ", N threads" as it is printed'
    parser.add_argument("--only", metavar="TEXT", help=only, **shared)
    parser.add_argument("--threads", type=at_least(1), help="threads of both; default: torch's, and 1", **shared)
    quick = f"{QUICK_SECONDS:g} s, no row of over {QUICK_BYTES / 1e6:g} MB"
    parser.add_argument("--quick", action="store_true", help=quick, **shared)
    parser.add_argument("--list", action="store_true", help="list the rows and the bytes they must move", **shared)
    parser.add_argument("--seed", type=at_least(0), metavar="N", help="draw the shapes at random")
    seconds = f"time for all rows, which share it; what it does not reach is left out; default: {SECONDS:g}"
    parser.add_argument("--seconds", type=non_negative, metavar="S", help=seconds)


def run(args, parser):
    """Sweep as ``args`` say and return the exit status."""
    rng = random.Random(args.seed)
    before = torch.get_num_threads()
    pairs = {
        f"{row.name}, {n_threads} thread{'s' * (n_threads > 1)}": (row, n_threads)
        for row in cases.sweep_rows(rng if args.seed is not None else None)
        for n_threads in ([args.threads] if args.threads else sorted({before, 1}, reverse=True))
        if not (args.quick and row.bytes_moved > QUICK_BYTES)
    }
    pairs = [(name, *pair) for name, pair in pairs.items() if args.only.lower() in name.lower()]
    if not pairs:
        parser.error(f"argument --only: must be part of a row's name (see --list), got {args.only!r}")
    if args.list:
        print("\n".join(dict.fromkeys(f"{row.name}  ({row.bytes_moved:,} B)" for _, row, _ in pairs)))
        return 0
    rng.shuffle(pairs)
    seconds = args.seconds if args.seconds is not None else QUICK_SECONDS if args.quick else SECONDS
    try:
        return _sweep(pairs, seconds)
    finally:
        torch.set_num_threads(before)


def _sweep(named_rows, seconds):
    deadline = time.monotonic() + seconds
    n_slow, n_failed, ratios = 0, 0, {}
    for index, (name, row, n_threads) in enumerate(named_rows):
        left_s = deadline - time.monotonic()
        if left_s <= 0 and index > 0:
            break
        torch.set_num_threads(n_threads)
        try:
            times = time_row(row, min(MAX_ROW_S, max(MIN_ROW_S, left_s / (len(named_rows) - index))))
        except Exception as error:
            n_failed += 1
            print(f"NOT RUN {name}: {type(error).__name__}: {error}", flush=True)
            continue
        ratios[name] = times.ratio
        if times.is_slow:
            n_slow += 1
            both = f"fastopt {times['fastopt']:,.1f} us, {times.torch} {times[times.torch]:,.1f} us"
            rate, copy_rate = (f"{row.bytes_moved / times[provider] / 1e3:.1f}" for provider in ("fastopt", "copy"))
            rates = f"{row.bytes_moved:,} B at {rate} GB/s, a plain copy's at {copy_rate}"
            print(f"SLOWER {times.ratio:.2f}x  {name}: {both}; {rates}", flush=True)
    n_left = len(named_rows) - len(ratios) - n_failed
    worst = min(ratios, key=ratios.get, default=None)
    print(
        f"{len(ratios) - n_slow} of {len(ratios)} rows at least as fast as torch"
        + (f", {n_failed} not run" if n_failed else "")
        + (f", {n_left} not reached in {seconds:g} s" if n_left else "")
        + (f"; worst {ratios[worst]:.2f}x: {worst}" if ratios else "")
    )
    return 3 if n_failed else int(n_slow > 0)


def time_row(row, budget_s):
    """Times of ``row``, the last ones if at first it looks slow; those have a plain copy too."""
    for n_rounds in (None, *[N_ROUNDS_AGAIN] * (N_TRIES - 1)):
        calls = calls_of(row)  # anew, for times depend on the place of arrays in memory
        row_s = budget_s
        if n_rounds:
            calls["copy"], row_s = measure.Copy(row.bytes_moved, "cpu"), max(AGAIN_S, 3 * budget_s)
        clock = measure.CpuClock(row_s / len(calls) / (n_rounds or 5))
        samples = measure.interleaved(calls, clock, n_rounds, row_s)
        del calls  # before others are made
        times = Times({name: 1e6 * measure.spread([s for s, _ in pairs])["median"] for name, pairs in samples.items()})
        if not times.is_slow:
            break
    return times


def calls_of(row):
    """The call of each eager provider, by name; of torch's only those that work."""
    ready, calls, n_expected = work.prepare(row, "cpu"), {}, None
    for provider in providers_for(row, "cpu"):
        if provider.package not in ("torch", "fastopt") or provider.compiles:
            continue
        try:
            started = ready.start(provider)
            started.call()
        except (NotOffered, RuntimeError, TypeError, ValueError):
            if provider.package == "torch":
                continue
            raise
        if row.kind == "optimizer":
            # torch 2.13's fused SGD updates a few elements at the end of 16-bit tensors, and leaves the others.
            n_changed = ready.n_changed(started)
            n_expected = n_changed if n_expected is None else n_expected  # the for-loop's
            if n_changed <= 0.9 * n_expected:
                continue
        calls[provider.name] = started.call
    if "fastopt" not in calls:
        raise RuntimeError("the step leaves parameters as they are")
    return calls
