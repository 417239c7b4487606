"""Finds rows, many small and large ones, in which fastopt is slower than torch: python benchmarks/sweep.py --help."""

import argparse
import random
import sys
import time
from math import prod

import torch

from fastopt import __main__ as fastopt_main
from fastopt._arguments import EXIT_STATUS, at_least, non_negative
from fastopt.bench import cases, measure, tables, work
from fastopt.bench.providers import NotOffered, providers_for

BAR = 0.95  # torch's time over fastopt's
NOISE_US = 2.0
MIN_ROW_S, MAX_ROW_S = 0.01, 1.0
N_TRIES, N_ROUNDS_AGAIN, AGAIN_S = 3, 11, 0.5  # of rows that look slow: in all, then in each try, for so long at least
SECONDS, QUICK_SECONDS, QUICK_BYTES = 600.0, 60.0, 8e6

DESCRIPTION = f"""\
Time every optimizer and loss over many options, sizes, layouts, dtypes and numbers of threads, beside the fastest of
torch's eager implementations (for-loop, foreach, fused). Prints the rows that fall short: fastopt takes more than
torch's time / {BAR}, and over {NOISE_US:g} us more. Such a row is made and measured again, longer, {N_TRIES - 1} times.
It is printed if it falls short each time, with the bytes that it must move and the rate at which it and a plain copy
move them: where the rates are the same, no kernel can do better. Rows are taken in a random order, so that a short
sweep is a sample. Exits with 1 if a row falls short, with 3 if fastopt does not run."""


MODELS = (
    ("one of 10", ((10,),)),
    ("4 tensors, 0.8 k", ((64, 8), (64,), (4, 64), (4,))),
    ("LeNet, 44 k", tables.LENET),
    ("300 tensors of 64", ((64,),) * 300),
    ("12 tensors, 1.6 M", ((512, 512), (512,)) * 6),
    ("3 tensors, 6 M", ((4000, 1000), (2000, 1000), (1000,))),
)
SHAPES = (
    *((1, 10), (64, 2), (64, 10), (256, 100), (8192, 5), (128, 1000), (2048, 1000)),
    *((1, 32000), (128, 32000)),
    *((16, 10, 2), (1024, 10, 2), (8, 4000, 2), (512, 100, 4), (64, 1000, 8)),  # few positions after the classes
    *((4, 21, 64, 64), (2, 19, 256, 256)),
)
# Layouts beside those of the benchmark, and the numbers of dimensions that each is for.
work.LAYOUTS |= {
    "transposed": lambda values: values.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda values: values.repeat_interleave(2, 0)[::2],
}
LAYOUT_DIMS = {"channels_last": (3, 4), "transposed": (2,), "rows apart": (2,)}


def sweep_rows(rng=None, dtypes=tuple(cases.DTYPES)):
    """All rows of the sweep; with a ``random.Random`` of shapes that it draws."""
    all_shapes = SHAPES if rng is None else _drawn_shapes(rng)
    models = MODELS if rng is None else list(_drawn_models(rng))
    for optimizer in tables.OPTIMIZERS:
        label = " ".join([optimizer.name, *cases.shown(optimizer.options)])
        for model, shapes in models if optimizer.torch_class else ():
            for dtype, suffix in cases.DTYPES.items():
                if dtype in dtypes:
                    yield cases.OptimizerCase(optimizer, f"{label}: {model}{suffix}", shapes, dtype)
    for loss in tables.LOSSES:
        for variant in loss.variants:
            n_dims = LAYOUT_DIMS.get(str(variant), (2, 3, 4))
            for shape in all_shapes:
                if len(shape) in n_dims:
                    yield from (cases.loss_case(loss, shape, dtype, variant) for dtype in dtypes)


def _drawn_models(rng):
    for _ in range(5):
        n_tensors, n_params = _log_uniform(rng, 1, 400), _log_uniform(rng, 200, 4e6)
        mean = n_params / n_tensors
        shapes = tuple((max(1, round(mean * rng.uniform(0.3, 1.7))),) for _ in range(n_tensors))
        yield f"{n_tensors} tensors, {sum(map(prod, shapes)):,}", shapes


def _drawn_shapes(rng):
    shapes = []
    while len(shapes) < 14:
        after = rng.choice([(), (), (), (300,), (128, 128)])
        shape = (_log_uniform(rng, 1, 4000), _log_uniform(rng, 2, 60000), *(_log_uniform(rng, 1, n) for n in after))
        if 20 <= prod(shape) <= 6e6:
            shapes.append(shape)
    return shapes


def _log_uniform(rng, low, high):
    return round(low * (high / low) ** rng.random())


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


def main(argv=None):
    """Sweep and return the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/sweep.py", description=DESCRIPTION, epilog=EXIT_STATUS)
    only = 'rows whose name has TEXT, with ", N threads" as it is printed'
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    parser.add_argument("--threads", type=at_least(1), help="threads of both; default: torch's, and 1")
    quick = f"{QUICK_SECONDS:g} s, no row of over {QUICK_BYTES / 1e6:g} MB"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--list", action="store_true", help="list the rows and the bytes they must move")
    parser.add_argument("--seed", type=at_least(0), metavar="N", help="draw the shapes at random")
    seconds = f"time for all rows, which share it; what it does not reach is left out; default: {SECONDS:g}"
    parser.add_argument("--seconds", type=non_negative, metavar="S", help=seconds)
    return fastopt_main.main(argv, parser, _run)


def _run(args, parser):
    rng = random.Random(args.seed)
    before = torch.get_num_threads()
    pairs = {
        f"{row.name}, {n_threads} thread{'s' * (n_threads > 1)}": (row, n_threads)
        for row in sweep_rows(rng if args.seed is not None else None)
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
        if provider.compiles:
            continue
        try:
            started = ready.start(provider)
            started.call()
        except (NotOffered, RuntimeError, TypeError, ValueError):
            if provider.name.startswith("torch"):
                continue
            raise
        if row.kind == "optimizer":
            # torch 2.13's fused SGD updates a few elements at the end of 16-bit tensors, and leaves the others.
            pairs = zip(started.results(), ready.params, strict=True)
            n_changed = sum(torch.count_nonzero(after != before).item() for after, before in pairs)
            n_expected = n_changed if n_expected is None else n_expected  # the for-loop's
            if n_changed <= 0.9 * n_expected:
                continue
        calls[provider.name] = started.call
    if "fastopt" not in calls:
        raise RuntimeError("the step leaves parameters as they are")
    return calls


if __name__ == "__main__":
    sys.exit(main())
