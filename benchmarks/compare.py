"""Finds where fastopt has become slower from one run of ``python -m fastopt bench --json`` to another.

    python benchmarks/compare.py FIRST.json SECOND.json [--tolerance SHARE] [--mean-tolerance SHARE]

Times of two runs differ with the machine and its load. So ratios of times that took turns in one process are compared:
fastopt's time over that of the fastest of torch's implementations, or over a plain copy's where torch was not timed.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from fastopt import __main__ as fastopt_main
from fastopt._arguments import EXIT_STATUS, non_negative
from fastopt.bench import report
from table import bad_input, read_json

TOLERANCE = 0.25  # of one case
MEAN_TOLERANCE = 0.05  # of the geometric mean of all, in which the noise of single cases averages out
FLAGGED = 0.10  # a change worth a note; torch's time has stayed if it changed by less
OTHER_CONDITIONS = 0.25  # a change of torch's own times that no noise explains

DESCRIPTION = """\
Compare two runs of python -m fastopt bench by fastopt's time over that of the fastest of torch's implementations, which
took turns with it; over a plain copy's where torch was not timed. Exits with 1 if a case or the mean of all is slower
than the tolerances allow, if fastopt's time alone is where torch's stayed, or if a case of the first run is missing or
not timed in the second. On a busy machine the times of a single case differ by half from run to run: repeat a run that
is slower before believing it."""
TOLERANCE_HELP = "rise of a case that is no failure; default: %(default)s"
MEAN_TOLERANCE_HELP = f"""rise of the geometric mean of all cases that is no failure; default: {MEAN_TOLERANCE}, and for
few cases the tolerance of one over the root of their number"""

CONDITIONS = {
    "processor": lambda machine: machine["processor"],
    "GPU": lambda machine: (machine["gpu"] or {}).get("name"),
    "threads": lambda machine: machine["threads"],
    "torch": lambda machine: machine["torch"],
    "fastopt's backend": lambda machine: machine["fastopt"]["backend"],
}


class Change(NamedTuple):
    """Times of one case, the second run's over the first's; None where they cannot be compared, and ``note`` says why.

    ``relative`` is fastopt's beside that of torch, or of the copy; ``ours`` and ``torch`` are of the times alone.
    """

    name: str
    note: str = ""
    relative: float | None = None
    ours: float | None = None
    torch: float | None = None


def changes(first, second):
    """A change for each case that either run has.

    Raises:
        ValueError: the runs are of different devices, or fastopt was timed in no case of the first.
    """
    devices = [run["settings"].get("device") for run in (first, second)]
    if devices[0] != devices[1]:
        raise ValueError(f"both runs must be of one device, got {devices[0]} and {devices[1]}")
    befores, afters = ({result["name"]: result for result in run["results"]} for run in (first, second))
    if not any("fastopt" in report.timed(result) for result in befores.values()):
        raise ValueError("the first run must have a case in which fastopt was timed, got none")
    return [_change(name, befores.get(name), afters.get(name)) for name in dict.fromkeys([*befores, *afters])]


def _change(name, before, after):
    if before is None:
        return Change(name, "only in the second")
    timed = report.timed(before), report.timed(after or {"providers": []})
    if "fastopt" not in timed[0]:
        return Change(name, "never timed")
    # A case that was timed and is now gone, fails or is wrong must not pass for unchanged.
    if "fastopt" not in timed[1]:
        return Change(name, "lost")
    fastest = [timed[i].get(report.summarize(result)["fastest_torch"]) for i, result in enumerate((before, after))]
    ours = _rise(timed[0]["fastopt"], timed[1]["fastopt"])
    torch, copy = _rise(*fastest), _rise(before["copy"], after["copy"])
    if torch:
        return Change(name, "", ours / torch, ours, torch)
    if copy:
        return Change(name, "beside the copy: torch was not timed", ours / copy, ours)
    return Change(name, "by its time alone: neither torch nor the copy was timed", ours, ours)


def _rise(before, after):
    return after["median_us"] / before["median_us"] if before and after else None


def judge(found, tolerance=TOLERANCE, mean_tolerance=None):
    """The table of changes with the reasons why the second run is slower, if it is.

    A case is slower if fastopt's time over torch's rose by more than ``tolerance``, or its time alone where torch's
    stayed. All are slower if the geometric mean rose by more than ``mean_tolerance``; None is 5 %, or the noise that
    ``tolerance`` in a case leaves in the mean of few.

    Returns:
        (lines, whether it is no slower)
    """
    mean, ours, torch = (_mean(change[index] for change in found) for index in (2, 3, 4))
    n_compared = sum(change.relative is not None for change in found)
    if mean_tolerance is None:
        mean_tolerance = max(MEAN_TOLERANCE, tolerance / math.sqrt(max(1, n_compared)))
    is_slower_in_the_mean = mean is not None and mean > 1 + mean_tolerance

    def is_slower(change):
        if change.relative is None:
            return False
        stayed = change.torch or torch
        rose_alone = stayed is not None and stayed <= 1 + FLAGGED and change.ours > 1 + tolerance
        return rose_alone or change.relative > 1 + tolerance

    width = max(len("geometric mean"), *(len(change.name) for change in found))
    lines = [f"{'':<{width}}  relative  fastopt    torch"]
    for change in found:
        torch_too = change.torch is not None and min(change.ours, change.torch) > 1 + OTHER_CONDITIONS
        lines.append(_line(width, change, is_slower(change), "torch is slower too" * torch_too))
    lines.append(_line(width, Change("geometric mean", "", mean, ours, torch), is_slower_in_the_mean))
    if torch is not None and not 1 / (1 + OTHER_CONDITIONS) < torch < 1 + OTHER_CONDITIONS:
        lines.append(f"torch's own times are {torch:.2f} of the first run's: another machine, load or torch")
    n_lines = len(lines)
    if lost := [change.name for change in found if change.note == "lost"]:
        lines.append(f"no longer timed: {'; '.join(lost)}")
    if slower := [change.name for change in found if is_slower(change)]:
        lines.append(f"slower by more than {tolerance:.0%} beside torch: {'; '.join(slower)}")
    if is_slower_in_the_mean:
        lines.append(f"slower in the mean: {mean:.3f}, {1 + mean_tolerance:.3f} allowed")
    return lines, len(lines) == n_lines


def conditions(first, second):
    """Lines about other differences between the runs."""
    for name, find in CONDITIONS.items():
        values = [find(run["machine"]) for run in (first, second)]
        if values[0] != values[1]:
            yield f"{name}: {values[0]} in the first run, {values[1]} in the second"


def _mean(values):
    """Geometric mean of those that are not None, or None."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def _line(width, change, is_slower, *notes):
    flag = "SLOWER" if is_slower else ""
    if not flag and change.relative and not 1 / (1 + FLAGGED) <= change.relative <= 1 + FLAGGED:
        flag = "slower" if change.relative > 1 else "faster"
    relative, ours, torch = ("-" if value is None else f"{value:.2f}" for value in change[2:])
    numbers = f"{relative:>8}  {ours:>7}  {torch:>7}"
    return "  ".join([f"{change.name:<{width}}", numbers, *filter(None, (flag, change.note, *notes))])


def main(argv=None):
    """Compare two files and return the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/compare.py", description=DESCRIPTION, epilog=EXIT_STATUS)
    parser.add_argument("first", type=Path, metavar="FIRST.json")
    parser.add_argument("second", type=Path, metavar="SECOND.json")
    parser.add_argument("--tolerance", type=non_negative, default=TOLERANCE, metavar="SHARE", help=TOLERANCE_HELP)
    parser.add_argument("--mean-tolerance", type=non_negative, metavar="SHARE", help=MEAN_TOLERANCE_HELP)
    return fastopt_main.main(argv, parser, _compare)


def _compare(args, parser):
    with bad_input(parser):
        runs = read_json(args.first), read_json(args.second)
        found = changes(*runs)
    lines, is_no_slower = judge(found, args.tolerance, args.mean_tolerance)
    print("\n".join([*conditions(*runs), *lines]))
    return 0 if is_no_slower else 1


if __name__ == "__main__":
    sys.exit(main())
