"""Results as lines on a terminal and as JSON; ``benchmarks/table.py`` makes Markdown of them."""

import json
import os
from pathlib import Path

SCHEMA = 1
COMPILE = "torch compile"
_LINE = "{:<15} {:>11} {:>21} {:>11} {:>8} {:>7} {:>9} {:>8}"
COLUMNS = _LINE.format("provider", "median_us", "p10-p90", "cold_us", "GB/s", "of_copy", "host_us", "extra_MB")


def timed(result):
    """The entries of the providers that were timed, by name."""
    return {entry["provider"]: entry for entry in result["providers"] if entry["status"] == "timed"}


def summarize(result):
    """fastopt beside the fastest of torch's own, its compiler, and a plain copy; None where one is missing.

    ``ratio`` and ``ratio_to_compile`` are the other's time over fastopt's, ``of_copy`` a copy's time over fastopt's.
    ``ratio_cold`` is to the fastest of torch's own when the caches hold nothing of the work, ``torch_cold_us``.
    """
    entries = timed(result)
    ours, compiled = entries.get("fastopt"), entries.get(COMPILE)
    stock = [entry for name, entry in entries.items() if name.split()[0] == "torch" and name != COMPILE]
    fastest = min(stock, key=lambda entry: entry["median_us"], default=None)
    cold_us = min((entry["cold_median_us"] for entry in stock if "cold_median_us" in entry), default=None)
    beside = compiled and (compiled.get("fastopt_beside_us") or (ours and ours["median_us"]))
    return {
        "fastest_torch": fastest and fastest["provider"],
        "ratio": fastest["median_us"] / ours["median_us"] if fastest and ours else None,
        "torch_cold_us": cold_us,
        "ratio_cold": cold_us / ours["cold_median_us"] if cold_us and ours else None,
        "ratio_to_compile": compiled["median_us"] / beside if beside else None,
        "of_copy": ours and ours["of_copy"],
    }


def lines(result):
    """A block of aligned lines, one a provider."""
    yield f"{result['name']}  ({result['working']})"
    for entry in filter(None, (result["copy"], *result["providers"])):
        if entry["status"] != "timed":
            yield f"  {entry['provider']:<15} {entry['status']}: {entry['reason']}"
            continue
        median, cold, host = (us(entry.get(f"{key}_us")) for key in ("median", "cold_median", "host"))
        speed = f"{entry['gb_per_s']:.1f}", f"{entry['of_copy']:.2f}"
        yield "  " + _LINE.format(entry["provider"], median, spread(entry), cold, *speed, host, megabytes(entry))


def to_dict(described, command, settings, missing, results):
    """The whole of the JSON."""
    run = {"schema": SCHEMA, "machine": described, "command": command, "settings": settings, "not_installed": missing}
    return run | {"results": [{**result, **summarize(result)} for result in results]}


def write_json(file, reported):
    """Replaces ``file`` at once, so that a run cut short leaves the last whole one."""
    draft = Path(file).with_name(f"{Path(file).name}.{os.getpid()}")
    draft.write_text(json.dumps(reported, indent=1, allow_nan=False) + "\n")
    draft.replace(file)


def us(value):
    return "-" if value is None else f"{value:,.1f}"


def spread(entry):
    return f"{us(entry['p10_us'])}-{us(entry['p90_us'])}"


def megabytes(entry):
    n_bytes = entry.get("extra_bytes")
    return us(n_bytes and n_bytes / 1e6)
