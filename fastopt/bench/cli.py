"""``python -m fastopt bench``: arguments, the run, and its exit status."""

import argparse
import dataclasses
import functools
import os
import shlex
import sys
from pathlib import Path

import torch

import fastopt

from .._arguments import EXIT_STATUS, at_least, new_file, non_negative
from . import compare, machine, plot, providers, report, runner, sweep
from .cases import cases_for

DESCRIPTION = """\
Time fastopt beside torch's own implementations, torch.compile and other libraries that are installed. Each result is
checked before it is timed; each case has a process of its own, in which the providers take turns. Exits with 1 if
fastopt's result is wrong, with 3 if it does not run."""

COMPARE_HELP = "tell what has become slower; exit with 1 if something has"
COMPARE_DESCRIPTION = """\
Compare two runs of python -m fastopt bench by fastopt's time over that of the fastest of torch's implementations, which
took turns with it; over a plain copy's where torch was not timed. Exits with 1 if a case or the mean of all is slower
than the tolerances allow, if fastopt's time alone is where torch's stayed, or if a case of the first run is missing or
not timed in the second. On a busy machine the times of a single case differ by half from run to run: repeat a run that
is slower before believing it."""


def add_arguments(parser):
    """The benchmark's arguments on ``parser``."""
    parser.description = DESCRIPTION
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no torch.compile, no long case")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=at_least(1), help="threads of torch and fastopt; default: torch's")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="time single calls too, the caches overwritten before each; always so on CUDA",
    )
    parser.add_argument("--rounds", type=at_least(1), help="turns of each provider; default: what fits some 4 s")
    parser.add_argument(
        "--compile",
        choices=("none", "loss", "step", "all"),
        help="what to time torch.compile of; default: loss, or none with --quick",
    )
    parser.add_argument("--timeout", type=at_least(1), default=600, metavar="S", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="list the cases and the bytes they must move")
    parser.set_defaults(bench_command=None)
    _add_outputs(parser)
    commands = parser.add_subparsers(metavar="COMMAND")
    table_help = "Markdown, README and picture from a JSON that is there"
    table = commands.add_parser("table", help=table_help, epilog=EXIT_STATUS)
    table.add_argument("file", type=Path, metavar="JSON")
    _add_outputs(table, has_json=False)
    table.set_defaults(bench_command=_table)
    compared = commands.add_parser("compare", help=COMPARE_HELP, description=COMPARE_DESCRIPTION, epilog=EXIT_STATUS)
    compared.add_argument("first", type=Path, metavar="FIRST.json")
    compared.add_argument("second", type=Path, metavar="SECOND.json")
    tolerance = f"rise of a case that is no failure; default: {compare.TOLERANCE}"
    compared.add_argument("--tolerance", type=non_negative, default=compare.TOLERANCE, metavar="SHARE", help=tolerance)
    mean_tolerance = f"""rise of the geometric mean of all cases that is no failure; default: {compare.MEAN_TOLERANCE},
        and for few cases the tolerance of one over the root of their number"""
    compared.add_argument("--mean-tolerance", type=non_negative, metavar="SHARE", help=mean_tolerance)
    compared.set_defaults(bench_command=_compare)
    swept = commands.add_parser("sweep", help=sweep.HELP, description=sweep.DESCRIPTION, epilog=EXIT_STATUS)
    sweep.add_arguments(swept)
    swept.set_defaults(bench_command=sweep.run)


def _add_outputs(parser, has_json=True):
    if has_json:
        parser.add_argument("--json", type=new_file, metavar="FILE", help="write all numbers, after every case")
    parser.add_argument("--png", type=new_file, metavar="FILE", help="draw the ratios; needs matplotlib")
    parser.add_argument(
        "--readme",
        type=functools.partial(readme_with, report.MARKERS),
        metavar="FILE",
        help=f"rewrite what is after {report.BEGIN}",
    )


def run(args, parser):
    """Do what ``args`` ask for and return the exit status."""
    if args.bench_command:
        return args.bench_command(args, parser)
    cases = cases_for(args.device, args.only, args.quick)
    if not cases:
        parser.error(f"argument --only: must be part of a case's name (see --list), got {args.only!r}")
    if args.list:
        for case in cases:
            print(f"{case.name}\n    {case.working}")
        return 0
    if args.device == "cuda" and args.cold:
        parser.error(
            "argument --cold: must be left out with --device cuda, where all times are with the cache overwritten"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device")
    return _run(args, parser, cases)


def _run(args, parser, cases):
    n_threads = args.threads or torch.get_num_threads()
    compiled = args.compile or ("none" if args.quick else "loss")
    settings = runner.Settings(args.device, n_threads, args.rounds, args.quick, compiled, args.timeout, args.cold)
    one_row = torch.zeros(1, 2, device=args.device), torch.zeros(1, dtype=torch.int64, device=args.device)
    fastopt.CrossEntropyLoss()(*one_row)  # builds the kernels if need be
    described = machine.describe(args.device, n_threads)
    missing = providers.not_installed(args.device)
    print(machine.one_line(described))
    _warn_if_busy(described)
    print(f"not installed: {', '.join(missing) or 'none'}\n\n  {report.COLUMNS}", flush=True)
    command = shlex.join(["python", "-m", "fastopt", "bench", *_arguments(args)])
    reported, results = None, []
    for case in cases:
        results.append(runner.run(case, settings))
        print("\n".join(report.lines(results[-1])), flush=True)
        reported = report.to_dict(described, command, dataclasses.asdict(settings), missing, results)
        if args.json:
            try:
                report.write_json(args.json, reported)
            except OSError as error:
                parser.error(str(error))
    status = _write(args, parser, reported)
    ours = {entry["status"] for result in results for entry in result["providers"] if entry["provider"] == "fastopt"}
    return status or (3 if "not run" in ours else 1 if "wrong" in ours else 0)


def _arguments(args):
    """The arguments that say what was measured, as they would be given again."""
    for name in ("device", "quick", "only", "threads", "rounds", "compile", "cold"):
        value = getattr(args, name)
        if value is True:
            yield f"--{name}"
        elif value and (name, value) != ("device", "cpu"):
            yield from (f"--{name}", str(value))


def _warn_if_busy(described):
    load = described["load"]
    if load is not None and load > 0.5 * os.cpu_count():
        print(
            f"this machine is busy (load {load:.1f} on {os.cpu_count()} CPUs): times will tell little", file=sys.stderr
        )


def _write(args, parser, reported):
    try:
        if args.readme:
            text = args.readme.read_text(encoding="utf-8")
            block = report.markdown(reported)
            args.readme.write_text(report.rewrite_between_markers(text, block), encoding="utf-8")
        if args.png:
            plot.save(args.png, reported)
    except ImportError as error:
        print(f"{parser.prog}: no picture, for there is no matplotlib ({error})", file=sys.stderr)
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _table(args, parser):
    reported = _read(args.file, parser)
    if not args.readme and not args.png:
        print(report.markdown(reported))
    return _write(args, parser, reported)


def _compare(args, parser):
    runs = _read(args.first, parser), _read(args.second, parser)
    try:
        found = compare.Comparison(compare.changes(*runs), args.tolerance, args.mean_tolerance)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join([*compare.conditions(*runs), *found.lines()]))
    return 0 if found.ok else 1


def _read(file, parser):
    try:
        return report.read_json(file)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def readme_with(markers, text):
    """The path of a file that holds both markers."""
    try:
        report.rewrite_between_markers(Path(text).read_text(encoding="utf-8"), "", markers)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return Path(text)
