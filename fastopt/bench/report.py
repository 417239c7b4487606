"""Results as lines on a terminal, as JSON, and as the Markdown of a README."""

import json
import math
import os
from collections import Counter
from pathlib import Path

from . import machine

SCHEMA = 1
BEGIN, END = MARKERS = "<!-- bench:begin -->", "<!-- bench:end -->"
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
        median, cold, host = (_us(entry.get(f"{key}_us")) for key in ("median", "cold_median", "host"))
        speed = f"{entry['gb_per_s']:.1f}", f"{entry['of_copy']:.2f}"
        yield "  " + _LINE.format(entry["provider"], median, _spread(entry), cold, *speed, host, _megabytes(entry))


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
        markdown(reported)  # which takes every part of it
        entries = [entry for result in reported["results"] for entry in (*timed(result).values(), result["copy"])]
        is_whole = reported["schema"] == SCHEMA and isinstance(reported["settings"], dict) and bool(entries)
        is_whole = is_whole and all(0 < entry["median_us"] < math.inf for entry in filter(None, entries))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{file} must hold results of python -m fastopt bench, schema {SCHEMA}")
    return reported


# Markdown.


def markdown(reported):
    """Tables of all results, with the machine and the command above."""
    results = reported["results"]
    rows = [_row(result) for result in results]
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    parts = [f"{machine.one_line(reported['machine'])}. `{reported['command']}`"]
    parts.append(table(heads, [[row[head] or "-" for head in heads] for row in rows]))
    others = [row for result in results for row in _other_rows(result)]
    if others:
        parts.append(table(("work", "library", "us", "fastopt, us", "ratio"), others))
    counts = Counter(
        f"{entry['provider']} {entry['status']}: {entry['reason']}"
        for result in results
        for entry in result["providers"]
        if entry["status"] != "timed"
    )
    left_out = [f"{reason} ({count} cases)" if count > 1 else reason for reason, count in counts.items()]
    if reported["not_installed"]:
        left_out.append(f"Not installed: {', '.join(reported['not_installed'])}")
    if left_out:
        parts.append("\n".join(f"- {line}" for line in left_out))
    return "\n\n".join(parts)


def table(heads, rows):
    body = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([body[0], "|---" * len(heads) + "|", *body[1:]])


def _row(result):
    """The cells by their column; None in columns that are left out where no case has a value."""
    entries = {entry["provider"]: entry for entry in result["providers"]}
    ours, stock = entries["fastopt"], entries.get(result["fastest_torch"], {})
    is_timed, cold, hosts = ours["status"] == "timed", None, [_us(entry.get("host_us")) for entry in (stock, ours)]
    if result.get("ratio_cold"):
        cold = f"{_ratio(result['ratio_cold'])} ({_us(result['torch_cold_us'])}, {_us(ours['cold_median_us'])})"
    return {
        "work": result["name"],
        "fastest torch, us": f"{_us(stock['median_us'])} ({stock['provider']})" if stock else "-",
        "fastopt, us": _us(ours["median_us"]) if is_timed else f"{ours['status']}: {ours['reason']}",
        "p10-p90": _spread(ours) if is_timed else "-",
        "ratio": _ratio(result["ratio"]),
        "cold": cold,
        "to compile": _number(result["ratio_to_compile"], ".1f", "x"),
        "of copy": _number(result["of_copy"], ".2f"),
        "host, us: torch, fastopt": None if hosts == ["-", "-"] else ", ".join(hosts),
        "extra MB: torch, fastopt": f"{_megabytes(stock)}, {_megabytes(ours)}",
    }


def _other_rows(result):
    ours = next(entry for entry in result["providers"] if entry["provider"] == "fastopt")
    for entry in result["providers"]:
        if entry["provider"].split()[0] in ("torch", "fastopt") or entry["status"] == "not run":
            continue
        if entry["status"] == "wrong":
            yield result["name"], entry["provider"], f"wrong: {entry['reason']}", "-", "-"
        else:
            us = entry.get("fastopt_beside_us") or ours.get("median_us")
            ratio = _ratio(us and entry["median_us"] / us)
            yield result["name"], entry["provider"], _us(entry["median_us"]), _us(us), ratio


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


def _us(value):
    return _number(value, ",.1f")


def _spread(entry):
    return f"{_us(entry['p10_us'])}-{_us(entry['p90_us'])}"


def _ratio(value):
    return f"**{value:.2f}x**" if value else "-"


def _megabytes(entry):
    n_bytes = entry.get("extra_bytes")
    return _number(n_bytes and n_bytes / 1e6, ",.1f")
