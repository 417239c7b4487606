"""``python -m fastopt bench compare``: finds where fastopt has become slower from one run to another.

Times of two runs differ with the machine and its load. So ratios of times that took turns in one process are
compared: fastopt's time over that of the fastest of torch's implementations, or over a plain copy's where torch was not
timed.
"""

import math
import statistics
from dataclasses import dataclass

from . import report

TOLERANCE = 0.25  # of one case
MEAN_TOLERANCE = 0.05  # of the geometric mean of all, in which the noise of single cases averages out
FLAGGED = 0.10  # a change worth a look, and all that a time changes that has stayed
OTHER_CONDITIONS = 0.25  # a change of torch's own times that no noise explains


@dataclass(frozen=True)
class Change:
    """Times of one case, the second run's over the first's; None where they cannot be compared, and ``note`` says why.

    ``ours`` is fastopt's, ``beside`` that of what took turns with it, ``torch`` the latter if torch was timed.
    """

    name: str
    ours: float | None = None
    beside: float | None = None
    torch: float | None = None
    note: str = ""

    @property
    def relative(self):
        return self.ours and self.ours / self.beside


@dataclass(frozen=True)
class Comparison:
    """The changes of all cases, judged.

    A case is slower if fastopt's time over torch's rose by more than ``tolerance``, or its time alone where torch's
    stayed. All are slower if the geometric mean rose by more than ``mean_tolerance``; None is 5 %, or what noise of
    ``tolerance`` in a case leaves in the mean of few.
    """

    changes: tuple
    tolerance: float = TOLERANCE
    mean_tolerance: float | None = None

    @property
    def torch(self):
        """How torch's own times have changed, in the mean, or None."""
        return _mean(change.torch for change in self.changes)

    @property
    def relative(self):
        return _mean(change.relative for change in self.changes)

    @property
    def lost(self):
        return [change.name for change in self.changes if change.note == "lost"]

    @property
    def slower(self):
        return [change.name for change in self.changes if self._is_slower(change)]

    @property
    def mean_allowed(self):
        if self.mean_tolerance is not None:
            return 1 + self.mean_tolerance
        n_compared = sum(change.relative is not None for change in self.changes)
        return 1 + max(MEAN_TOLERANCE, self.tolerance / math.sqrt(max(1, n_compared)))

    @property
    def is_slower_in_the_mean(self):
        return self.relative is not None and self.relative > self.mean_allowed

    @property
    def ok(self):
        return not (self.lost or self.slower or self.is_slower_in_the_mean)

    def lines(self):
        """A table of the second run's times over the first's, and what to know about it."""
        width = max(len("geometric mean"), *(len(change.name) for change in self.changes))
        yield f"{'':<{width}}  relative  fastopt    torch"
        for change in self.changes:
            notes = _flag(change.relative, self._is_slower(change)), change.note, _torch_too(change)
            yield _line(width, change.name, (change.relative, change.ours, change.torch), *notes)
        ours = _mean(change.ours for change in self.changes)
        flag = _flag(self.relative, self.is_slower_in_the_mean)
        yield _line(width, "geometric mean", (self.relative, ours, self.torch), flag)
        if self.torch is not None and not 1 / (1 + OTHER_CONDITIONS) < self.torch < 1 + OTHER_CONDITIONS:
            yield f"torch's own times are {self.torch:.2f} of the first run's: another machine, load or torch"
        if self.lost:
            yield f"no longer timed: {'; '.join(self.lost)}"
        if self.slower:
            yield f"slower by more than {self.tolerance:.0%} beside torch: {'; '.join(self.slower)}"
        if self.is_slower_in_the_mean:
            yield f"slower in the mean: {self.relative:.3f}, {self.mean_allowed:.3f} allowed"

    def _is_slower(self, change):
        if change.relative is None:
            return False
        stayed = change.torch if change.torch is not None else self.torch
        rose_alone = stayed is not None and stayed <= 1 + FLAGGED and change.ours > 1 + self.tolerance
        return rose_alone or change.relative > 1 + self.tolerance


def changes(first, second):
    """A change for each case that either run has.

    Raises:
        ValueError: the runs are of different devices, or fastopt was timed in no case of the first.
    """
    devices = [run["settings"].get("device") for run in (first, second)]
    if devices[0] != devices[1]:
        raise ValueError(f"both runs must be of one device, got {devices[0]} and {devices[1]}")
    befores, afters = ({result["name"]: result for result in run["results"]} for run in (first, second))
    if not any(_timed(result, "fastopt") for result in befores.values()):
        raise ValueError("the first run must have a case in which fastopt was timed, got none")
    return tuple(_change(name, befores.get(name), afters.get(name)) for name in dict.fromkeys([*befores, *afters]))


def conditions(first, second):
    """Lines about what else differs between the runs."""
    for name, find in {
        "processor": lambda machine: machine["processor"],
        "GPU": lambda machine: (machine["gpu"] or {}).get("name"),
        "threads": lambda machine: machine["threads"],
        "torch": lambda machine: machine["torch"],
        "fastopt's backend": lambda machine: machine["fastopt"]["backend"],
    }.items():
        values = [find(run["machine"]) for run in (first, second)]
        if values[0] != values[1]:
            yield f"{name}: {values[0]} in the first run, {values[1]} in the second"


def _change(name, before, after):
    if before is None:
        return Change(name, note="only in the second")
    if not _timed(before, "fastopt"):
        return Change(name, note="never timed")
    # A case that was timed and is now gone, fails or is wrong must not pass for unchanged.
    if after is None or not _timed(after, "fastopt"):
        return Change(name, note="lost")
    ours = _timed(after, "fastopt") / _timed(before, "fastopt")
    fastest = [_timed(result, report.summarize(result)["fastest_torch"]) for result in (before, after)]
    if all(fastest):
        torch = fastest[1] / fastest[0]
        return Change(name, ours, torch, torch)
    copies = [(result["copy"] or {}).get("median_us") for result in (before, after)]
    if all(copies):
        return Change(name, ours, copies[1] / copies[0], note="beside the copy: torch was not timed")
    return Change(name, ours, 1.0, note="by its time alone: neither torch nor the copy was timed")


def _timed(result, provider):
    """The provider's median, or None."""
    entries = (entry for entry in result["providers"] if entry["provider"] == provider and entry["status"] == "timed")
    return next((entry["median_us"] for entry in entries), None)


def _mean(values):
    """Geometric mean of those that are not None, or None."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def _flag(relative, is_slower):
    if is_slower:
        return "SLOWER"
    if relative is None or 1 / (1 + FLAGGED) <= relative <= 1 + FLAGGED:
        return ""
    return "slower" if relative > 1 else "faster"


def _torch_too(change):
    is_slower = change.torch is not None and min(change.ours, change.torch) > 1 + OTHER_CONDITIONS
    return "torch is slower too" if is_slower else ""


def _line(width, name, values, *notes):
    relative, ours, torch = ("-" if value is None else f"{value:.2f}" for value in values)
    return "  ".join([f"{name:<{width}}", f"{relative:>8}  {ours:>7}  {torch:>7}", *filter(None, notes)])
