"""Makes the tables of docs/benchmarks.md, and a picture, from what ``python -m fastopt bench --json`` has written.

python benchmarks/table.py RUN.json [--readme FILE] [--png FILE]
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import plot
from fastopt import __main__ as fastopt_main
from fastopt._arguments import EXIT_STATUS, new_file
from fastopt.bench import machine
from fastopt.bench.report import SCHEMA, megabytes, spread, timed, us

BEGIN, END = MARKERS = "<!-- bench:begin -->", "<!-- bench:end -->"


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
    is_timed, cold, hosts = ours["status"] == "timed", None, [us(entry.get("host_us")) for entry in (stock, ours)]
    if result.get("ratio_cold"):
        cold = f"{_ratio(result['ratio_cold'])} ({us(result['torch_cold_us'])}, {us(ours['cold_median_us'])})"
    return {
        "work": result["name"],
        "fastest torch, us": f"{us(stock['median_us'])} ({stock['provider']})" if stock else "-",
        "fastopt, us": us(ours["median_us"]) if is_timed else f"{ours['status']}: {ours['reason']}",
        "p10-p90": spread(ours) if is_timed else "-",
        "ratio": _ratio(result["ratio"]),
        "cold": cold,
        "to compile": _number(result["ratio_to_compile"], ".1f", "x"),
        "of copy": _number(result["of_copy"], ".2f"),
        "host, us: torch, fastopt": None if hosts == ["-", "-"] else ", ".join(hosts),
        "extra MB: torch, fastopt": f"{megabytes(stock)}, {megabytes(ours)}",
    }


def _other_rows(result):
    ours = next(entry for entry in result["providers"] if entry["provider"] == "fastopt")
    for entry in result["providers"]:
        if entry["provider"].split()[0] in ("torch", "fastopt") or entry["status"] == "not run":
            continue
        if entry["status"] == "wrong":
            yield result["name"], entry["provider"], f"wrong: {entry['reason']}", "-", "-"
        else:
            our_us = entry.get("fastopt_beside_us") or ours.get("median_us")
            ratio = _ratio(our_us and entry["median_us"] / our_us)
            yield result["name"], entry["provider"], us(entry["median_us"]), us(our_us), ratio


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


def _ratio(value):
    return f"**{value:.2f}x**" if value else "-"


def readme_with(markers, text):
    """The path of a file that holds both markers."""
    try:
        rewrite_between_markers(Path(text).read_text(encoding="utf-8"), "", markers)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return Path(text)


@contextlib.contextmanager
def bad_input(parser):
    """A file that cannot be read or written, or whose content does not fit, is bad input."""
    try:
        yield
    except (OSError, ValueError) as error:
        parser.error(str(error))


def main(argv=None):
    """Print the tables, or write them or a picture, and return the exit status."""
    description = "Markdown on the screen, or in a page between its markers, and a picture of the ratios."
    parser = argparse.ArgumentParser(prog="python benchmarks/table.py", description=description, epilog=EXIT_STATUS)
    parser.add_argument("file", type=Path, metavar="RUN.json")
    parser.add_argument("--png", type=new_file, metavar="FILE", help="draw the ratios; needs matplotlib")
    readme = functools.partial(readme_with, MARKERS)
    parser.add_argument("--readme", type=readme, metavar="FILE", help=f"rewrite what is after {BEGIN}")
    return fastopt_main.main(argv, parser, _write)


def _write(args, parser):
    with bad_input(parser):
        reported = read_json(args.file)
        if not args.readme and not args.png:
            print(markdown(reported))
        if args.readme:
            text = rewrite_between_markers(args.readme.read_text(encoding="utf-8"), markdown(reported))
            args.readme.write_text(text, encoding="utf-8")
        try:
            if args.png:
                plot.save(args.png, reported)
        except ImportError as error:
            print(f"{parser.prog}: no picture, for there is no matplotlib ({error})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
