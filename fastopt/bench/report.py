"""Results as lines on a terminal, as JSON, and as the Markdown of a README."""

import json
import math
import os
from pathlib import Path

from . import machine

SCHEMA = 1
BEGIN, END = MARKERS = "<!-- bench:begin -->", "<!-- bench:end -->"
COMPILE = "torch compile"
COLUMNS = (
    f"{'provider':<15} {'median_us':>11} {'p10-p90':>21} {'cold_us':>11} {'GB/s':>8} {'of_copy':>7} {'host_us':>9} "
    f"{'extra_MB':>8}"
)


def summarize(result):
    """fastopt beside the fastest of torch's own, its compiler, and a plain copy; None where one is missing.

    ``ratio`` and ``ratio_to_compile`` are the other's time over fastopt's, ``of_copy`` a copy's time over fastopt's.
    ``ratio_cold`` is to the fastest of torch's own when the caches hold nothing of the work, ``torch_cold_us``.
    """
    timed = {entry["provider"]: entry for entry in result["providers"] if entry["status"] == "timed"}
    ours, compiled = timed.get("fastopt"), timed.get(COMPILE)
    stock = [entry for name, entry in timed.items() if name.split()[0] == "torch" and name != COMPILE]
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


# Lines.


def lines(result):
    """A block of aligned lines, one a provider."""
    yield f"{result['name']}  ({result['working']})"
    copy = [result["copy"]] if result["copy"] else []
    for entry in (*copy, *result["providers"]):
        if entry["status"] != "timed":
            yield f"  {entry['provider']:<15} {entry['status']}: {entry['reason']}"
            continue
        spread = f"{entry['p10_us']:,.1f}-{entry['p90_us']:,.1f}"
        cold = _number(entry.get("cold_median_us"), ",.1f")
        times = (
            f"{entry['median_us']:>11,.1f} {spread:>21} {cold:>11} {entry['gb_per_s']:>8.1f} {entry['of_copy']:>7.2f}"
        )
        host, extra = _number(entry.get("host_us"), ",.1f"), _megabytes(entry.get("extra_bytes"))
        yield f"  {entry['provider']:<15} {times} {host:>9} {extra:>8}"


# JSON.


def to_dict(described, command, settings, missing, results):
    return {
        "schema": SCHEMA,
        "machine": described,
        "command": command,
        "settings": settings,
        "not_installed": missing,
        "results": [{**result, **summarize(result)} for result in results],
    }


def write_json(file, reported):
    """Replaces ``file`` at once, so that a run cut short leaves the last whole one."""
    draft = Path(file).with_name(f"{Path(file).name}.{os.getpid()}")
    draft.write_text(json.dumps(reported, indent=1, allow_nan=False) + "\n")
    draft.replace(file)


def read_json(file):
    """
    Raises:
        ValueError: the file is not of this version's benchmark.
        OSError: it cannot be read.
    """
    try:
        reported = json.loads(Path(file).read_text(encoding="utf-8"))
        is_whole = reported["schema"] == SCHEMA and isinstance(reported["settings"], dict)
        is_whole = is_whole and _has_times(reported["results"])
        markdown(reported)  # which takes every part of it
    except (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{file} must hold results of python -m fastopt bench, schema {SCHEMA}")
    return reported


def _has_times(results):
    """There are results, and every time is a positive number."""
    timed = [entry for result in results for entry in result["providers"] if entry["status"] == "timed"]
    timed += [result["copy"] for result in results if result["copy"]]
    return bool(results) and all(0 < entry["median_us"] < math.inf for entry in timed)


# Markdown.


def markdown(reported):
    """Tables of all results, with the machine and the command above."""
    results = reported["results"]
    parts = [f"{machine.one_line(reported['machine'])}. `{reported['command']}`", _main_table(results)]
    others = [row for result in results for row in _other_rows(result)]
    if others:
        parts.append("| work | library | us | fastopt, us | ratio |\n|---|---|---|---|---|\n" + "\n".join(others))
    left_out = _left_out(results, reported["not_installed"])
    if left_out:
        parts.append("\n".join(f"- {line}" for line in left_out))
    return "\n\n".join(parts)


def _main_table(results):
    has_host = any(entry.get("host_us") for result in results for entry in result["providers"])
    has_cold = any(result.get("ratio_cold") for result in results)
    heads = ["work", "fastest torch, us", "fastopt, us", "p10-p90", "ratio", *["cold"] * has_cold]
    heads += ["to compile", "of copy"] + ["host, us: torch, fastopt"] * has_host + ["extra MB: torch, fastopt"]
    rows = [_row(result, has_host, has_cold) for result in results]
    table = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    table.insert(1, "|---" * len(heads) + "|")
    return "\n".join(table)


def _row(result, has_host, has_cold):
    entries = {entry["provider"]: entry for entry in result["providers"]}
    ours, stock = entries["fastopt"], entries.get(result["fastest_torch"], {})
    both = lambda key, show: f"{show(stock.get(key))}, {show(ours.get(key))}"  # noqa: E731
    spread = f"{ours['p10_us']:,.1f}-{ours['p90_us']:,.1f}" if ours["status"] == "timed" else "-"
    return [
        result["name"],
        f"{stock['median_us']:,.1f} ({stock['provider']})" if stock else "-",
        f"{ours['median_us']:,.1f}" if ours["status"] == "timed" else f"{ours['status']}: {ours['reason']}",
        spread,
        f"**{result['ratio']:.2f}x**" if result["ratio"] else "-",
        *[_cold(result, ours)] * has_cold,
        _number(result["ratio_to_compile"], ".1f", "x"),
        _number(result["of_copy"], ".2f"),
        *([both("host_us", lambda value: _number(value, ",.1f"))] * has_host),
        both("extra_bytes", _megabytes),
    ]


def _cold(result, ours):
    if not result.get("ratio_cold"):
        return "-"
    return f"**{result['ratio_cold']:.2f}x** ({result['torch_cold_us']:,.1f}, {ours['cold_median_us']:,.1f})"


def _other_rows(result):
    ours = next(entry for entry in result["providers"] if entry["provider"] == "fastopt")
    for entry in result["providers"]:
        if entry["provider"].split()[0] in ("torch", "fastopt") or entry["status"] == "not run":
            continue
        if entry["status"] == "wrong":
            yield f"| {result['name']} | {entry['provider']} | wrong: {entry['reason']} | - | - |"
            continue
        us = entry.get("fastopt_beside_us") or ours.get("median_us")
        ratio = f"**{entry['median_us'] / us:.2f}x**" if us else "-"
        times = f"{entry['median_us']:,.1f} | {_number(us, ',.1f')}"
        yield f"| {result['name']} | {entry['provider']} | {times} | {ratio} |"


def _left_out(results, missing):
    """Each reason why a provider was not timed, once."""
    counts = {}
    for result in results:
        for entry in result["providers"]:
            if entry["status"] != "timed":
                reason = f"{entry['provider']} {entry['status']}: {entry['reason']}"
                counts[reason] = counts.get(reason, 0) + 1
    reasons = [f"{reason} ({count} cases)" if count > 1 else reason for reason, count in counts.items()]
    return reasons + ([f"Not installed: {', '.join(missing)}"] if missing else [])


def rewrite_between_markers(text, block, markers=MARKERS):
    """``text`` with ``block`` between the two markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = markers
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end or begin in rest or end in after:
        raise ValueError(f"must hold {begin} and after it {end}, once each")
    return f"{before}{begin}\n{block}\n{end}{after}"


def _number(value, form, unit=""):
    return "-" if value is None else f"{value:{form}}{unit}"


def _megabytes(n_bytes):
    return "-" if n_bytes is None else f"{n_bytes / 1e6:,.1f}"
