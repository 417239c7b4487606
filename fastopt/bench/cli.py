"""``python -m fastopt bench``: arguments, the run, and its exit status."""

import dataclasses
import os
import shlex
import sys

import torch

import fastopt

from .._arguments import at_least, new_file
from . import machine, report, runner
from .cases import benchmark_cases

DESCRIPTION = """\
Time fastopt beside torch's own implementations and torch.compile. Each result is checked before it is timed; each case
has a process of its own, in which the providers take turns. Exits with 1 if fastopt's result is wrong, with 3 if it
does not run."""


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


def run(args, parser, not_installed=()):
    """Time the cases that ``args`` choose and return the exit status; ``not_installed``: packages to be named."""
    cases = benchmark_cases(args.device, args.only, args.quick)
    if not cases:
        parser.error(f"argument --only: must be part of a case's name (see --list), got {args.only!r}")
    if args.list:
        print("\n".join(f"{case.name}\n    {case.working}" for case in cases))
        return 0
    if args.device == "cuda" and args.cold:
        rule = "must be left out with --device cuda, where all times are with the cache overwritten"
        parser.error(f"argument --cold: {rule}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device")
    compiled = args.compile or ("none" if args.quick else "loss")
    n_threads = args.threads or torch.get_num_threads()
    settings = runner.Settings(args.device, n_threads, args.rounds, args.quick, compiled, args.timeout, args.cold)
    one_row = torch.zeros(1, 2, device=args.device), torch.zeros(1, dtype=torch.int64, device=args.device)
    fastopt.CrossEntropyLoss()(*one_row)  # builds the kernels if need be
    described = machine.describe(args.device, n_threads)
    print(machine.one_line(described))
    if (described["load"] or 0) > 0.5 * os.cpu_count():
        busy = f"this machine is busy (load {described['load']:.1f} on {os.cpu_count()} CPUs): times will tell little"
        print(busy, file=sys.stderr)
    if not_installed:
        print(f"not installed: {', '.join(not_installed)}")
    print(f"\n  {report.COLUMNS}", flush=True)
    command, results = shlex.join([*parser.prog.split(), *_arguments(args, parser)]), []
    for case in cases:
        results.append(runner.run(case, settings))
        print("\n".join(report.lines(results[-1])), flush=True)
        reported = report.to_dict(described, command, dataclasses.asdict(settings), list(not_installed), results)
        if args.json:
            try:
                report.write_json(args.json, reported)
            except OSError as error:
                parser.error(str(error))
    ours = {entry["status"] for result in results for entry in result["providers"] if entry["provider"] == "fastopt"}
    return 3 if "not run" in ours else 1 if "wrong" in ours else 0


def _arguments(args, parser):
    """The arguments that change the results, as they would be given again."""
    for name in ("device", "quick", "only", "threads", "rounds", "compile", "cold"):
        value = getattr(args, name)
        if value != parser.get_default(name):
            yield from [f"--{name}"] if value is True else [f"--{name}", str(value)]
