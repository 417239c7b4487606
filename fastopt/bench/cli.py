"""``python -m fastopt bench``: arguments, the run, and its exit status."""

import argparse
import contextlib
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
from .cases import benchmark_cases
from .worker import Settings

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
TOLERANCE_HELP = f"rise of a case that is no failure; default: {compare.TOLERANCE}"
MEAN_TOLERANCE_HELP = f"""rise of the geometric mean of all cases that is no failure; default: {compare.MEAN_TOLERANCE},
and for few cases the tolerance of one over the root of their number"""


def add_arguments(parser):
    """The benchmark's arguments on ``parser``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rounds, no torch.compile, no long case")
    add("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=at_least(1), help="threads of torch and fastopt; default: torch's")
    cold = "time single calls too, the caches overwritten before each; always so on CUDA"
    add("--cold", action="store_true", help=cold)
    add("--rounds", type=at_least(1), help="turns of each provider; default: what fits some 4 s")
    compiled = "what to time torch.compile of; default: loss, or none with --quick"
    add("--compile", choices=("none", "loss", "step", "all"), help=compiled)
    add("--timeout", type=at_least(1), default=600, metavar="S", help="default: %(default)s")
    add("--list", action="store_true", help="list the cases and the bytes they must move")
    add("--json", type=new_file, metavar="FILE", help="write all numbers, after every case")
    _add_outputs(parser)
    parser.set_defaults(bench_command=_bench)

    commands = parser.add_subparsers(metavar="COMMAND")
    table = commands.add_parser(
        "table", help="Markdown, README and picture from a JSON that is there", epilog=EXIT_STATUS
    )
    table.add_argument("file", type=Path, metavar="JSON")
    _add_outputs(table)
    table.set_defaults(bench_command=_table)
    two = commands.add_parser("compare", help=COMPARE_HELP, description=COMPARE_DESCRIPTION, epilog=EXIT_STATUS)
    two.add_argument("first", type=Path, metavar="FIRST.json")
    two.add_argument("second", type=Path, metavar="SECOND.json")
    two.add_argument("--tolerance", type=non_negative, default=compare.TOLERANCE, metavar="SHARE", help=TOLERANCE_HELP)
    two.add_argument("--mean-tolerance", type=non_negative, metavar="SHARE", help=MEAN_TOLERANCE_HELP)
    two.set_defaults(bench_command=_compare)
    sweep.add_arguments(commands.add_parser("sweep", help=sweep.HELP, epilog=EXIT_STATUS))


def _add_outputs(parser):
    parser.add_argument("--png", type=new_file, metavar="FILE", help="draw the ratios; needs matplotlib")
    readme = functools.partial(readme_with, report.MARKERS)
    parser.add_argument("--readme", type=readme, metavar="FILE", help=f"rewrite what is after {report.BEGIN}")


def readme_with(markers, text):
    """The path of a file that holds both markers."""
    try:
        report.rewrite_between_markers(Path(text).read_text(encoding="utf-8"), "", markers)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return Path(text)


def run(args, parser):
    """Run the command of ``args`` and return the exit status."""
    return args.bench_command(args, parser)


@contextlib.contextmanager
def _bad_input(parser):
    """A file that cannot be read or written, or whose content does not fit, is bad input."""
    try:
        yield
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _bench(args, parser):
    cases = benchmark_cases(args.device, args.only, args.quick)
    if not cases:
        parser.error(f"argument --only: must be part of a case's name (see --list), got {args.only!r}")
    if args.list:
        print("\n".join(f"{case.name}\n    {case.working}" for case in cases))
        return 0
    if args.device == "cuda" and args.cold:
        parser.error(
            "argument --cold: must be left out with --device cuda, where all times are with the cache overwritten"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device")
    compiled = args.compile or ("none" if args.quick else "loss")
    n_threads = args.threads or torch.get_num_threads()
    settings = Settings(args.device, n_threads, args.rounds, args.quick, compiled, args.timeout, args.cold)
    one_row = torch.zeros(1, 2, device=args.device), torch.zeros(1, dtype=torch.int64, device=args.device)
    fastopt.CrossEntropyLoss()(*one_row)  # builds the kernels if need be
    described, missing = machine.describe(args.device, n_threads), providers.not_installed(args.device)
    print(machine.one_line(described))
    if (described["load"] or 0) > 0.5 * os.cpu_count():
        busy = f"this machine is busy (load {described['load']:.1f} on {os.cpu_count()} CPUs): times will tell little"
        print(busy, file=sys.stderr)
    print(f"not installed: {', '.join(missing) or 'none'}\n\n  {report.COLUMNS}", flush=True)
    command, results = shlex.join(["python", "-m", "fastopt", "bench", *_arguments(args)]), []
    for case in cases:
        results.append(runner.run(case, settings))
        print("\n".join(report.lines(results[-1])), flush=True)
        reported = report.to_dict(described, command, dataclasses.asdict(settings), missing, results)
        if args.json:
            with _bad_input(parser):
                report.write_json(args.json, reported)
    _write(args, parser, reported)
    ours = {entry["status"] for result in results for entry in result["providers"] if entry["provider"] == "fastopt"}
    return 3 if "not run" in ours else 1 if "wrong" in ours else 0


def _arguments(args):
    """The arguments that change the results, as they would be given again."""
    for name in ("device", "quick", "only", "threads", "rounds", "compile", "cold"):
        value = getattr(args, name)
        if value is True:
            yield f"--{name}"
        elif value and (name, value) != ("device", "cpu"):
            yield from (f"--{name}", str(value))


def _write(args, parser, reported):
    try:
        with _bad_input(parser):
            if args.readme:
                text = args.readme.read_text(encoding="utf-8")
                text = report.rewrite_between_markers(text, report.markdown(reported))
                args.readme.write_text(text, encoding="utf-8")
            if args.png:
                plot.save(args.png, reported)
    except ImportError as error:
        print(f"{parser.prog}: no picture, for there is no matplotlib ({error})", file=sys.stderr)


def _table(args, parser):
    with _bad_input(parser):
        reported = report.read_json(args.file)
    if not args.readme and not args.png:
        print(report.markdown(reported))
    _write(args, parser, reported)
    return 0


def _compare(args, parser):
    with _bad_input(parser):
        runs = report.read_json(args.first), report.read_json(args.second)
        changes = compare.changes(*runs)
    lines, is_no_slower = compare.judge(changes, args.tolerance, args.mean_tolerance)
    print("\n".join([*compare.conditions(*runs), *lines]))
    return 0 if is_no_slower else 1
