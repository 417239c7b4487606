"""``python -m fastopt bench compare``: whether fastopt has become slower from one run to another."""

from dataclasses import dataclass

FLAGGED = 0.10  # a change worth a look


@dataclass(frozen=True)
class Change:
    """Time of fastopt in copies of the same bytes, the second run's over the first's."""

    name: str
    ratio: float | None
    note: str = ""

    def is_failure(self, tolerance):
        return self.note == "lost" or (self.ratio is not None and self.ratio > 1 + tolerance)


def changes(first, second):
    """A change for each case that either run has."""
    befores, afters = ({result["name"]: result for result in told["results"]} for told in (first, second))
    for name in dict.fromkeys([*befores, *afters]):
        if name not in afters or name not in befores:
            yield Change(name, None, "only in the first" if name in befores else "only in the second")
            continue
        before, after = _copies(befores[name]), _copies(afters[name])
        if before is None or after is None:
            # What was timed and is no longer, because it fails or is wrong, must not pass for unchanged.
            yield Change(name, None, "never timed" if before is None else "lost")
            continue
        yield Change(name, after / before)


def lines(found, tolerance):
    width = max((len(change.name) for change in found), default=0)
    for change in found:
        if change.ratio is None:
            yield f"{change.name:<{width}}  {'-':>6}  {change.note}"
            continue
        flag = ""
        if change.ratio > 1 + FLAGGED:
            flag = "SLOWER" if change.is_failure(tolerance) else "slower"
        elif change.ratio < 1 / (1 + FLAGGED):
            flag = "faster"
        yield f"{change.name:<{width}}  {change.ratio:>6.2f}  {flag}".rstrip()


def _copies(result):
    """fastopt's median over that of a plain copy in the same run."""
    ours = next((entry for entry in result["providers"] if entry["provider"] == "fastopt"), None)
    if ours is None or ours["status"] != "timed" or not result["copy"]:
        return None
    return ours["median_us"] / result["copy"]["median_us"]
