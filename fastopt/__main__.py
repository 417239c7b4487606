"""``python -m fastopt``: the demo, the benchmark, the state of the kernels here, and building them ahead of use."""

import argparse
import importlib
import json
import os
import sys
import traceback

import torch

import fastopt

from ._arguments import EXIT_STATUS
from ._build import environment, native
from ._build.commands import BadVariable, BuildError

PROG = "python -m fastopt"


def main(argv=None, parser=None, run=None):
    """Run one subcommand and return its exit status, one of those in ``EXIT_STATUS``.

    Programs in benchmarks/ have a ``parser`` of their own, and ``run(args, parser)`` in the subcommand's place.
    """
    prog = PROG
    try:
        if parser is not None:
            parser.set_defaults(run=run, command_parser=parser)
        args = (parser or _parser()).parse_args(argv)
        prog = args.command_parser.prog
        try:
            environment.check()
        except ValueError as error:
            return _fail(prog, error, 2)
        status = args.run(args, args.command_parser)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error.__cause__, BuildError):  # requested kernels are missing; the message says why
            return _no_kernels(prog, error)
        traceback.print_exc()
        return 3
    return status


def _no_kernels(prog, error):
    return _fail(prog, error, 2 if isinstance(error.__cause__, BadVariable) else 3)


def _fail(prog, error, status):
    print(f"{prog}: error: {error}", file=sys.stderr)
    return status


def _parser():
    parser = argparse.ArgumentParser(
        prog=PROG, description="Fused optimizers and losses for PyTorch.", epilog=EXIT_STATUS
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, run, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, epilog=EXIT_STATUS)
        add_arguments(command)
        command.set_defaults(run=run, command_parser=command)
    return parser


def _cli(package):
    """A command's own functions, imported only when they are called: main() reports an import that fails."""

    def function(name):
        return lambda *args: getattr(importlib.import_module(f"fastopt.{package}.cli"), name)(*args)

    return function("add_arguments"), function("run")


def _info_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(args, parser):
    if torch.cuda.is_available():
        torch.cuda.init()  # so that the CUDA kernels can be looked at
    info = fastopt.info()
    if args.json:
        print(json.dumps(info, indent=1, default=str))
        return _info_status(info, parser)
    width = max(map(len, info))
    for key, value in info.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else value
        print(f"{key:<{width}}  {'none' if shown is None else shown}")
    return _info_status(info, parser)


def _info_status(info, parser):
    if info.get("backend") == "none":
        return _fail(parser.prog, f"FASTOPT_BACKEND=native, but the kernels cannot be used: {info['reason']}", 3)
    return 0


def _build_arguments(parser):
    parser.add_argument("--verbose", action="store_true", help="show the compiler's output")


def _build(args, parser):
    try:
        print(fastopt.build(verbose=args.verbose))
        cuda_library = native.build_cuda()
    except RuntimeError as error:
        return _no_kernels(parser.prog, error)
    if cuda_library is not None:
        print(cuda_library)
    return 0


# Each subcommand: the function that adds its arguments, the one that runs it, and its line of help.
COMMANDS = {
    "demo": (*_cli("demo"), "train a CNN with stock torch and with fastopt, side by side"),
    "bench": (*_cli("bench"), "time fastopt beside torch"),
    "info": (_info_arguments, _info, "report which kernels run here, and why"),
    "build": (_build_arguments, _build, "compile the kernels now instead of on first use"),
}

if __name__ == "__main__":
    sys.exit(main())
