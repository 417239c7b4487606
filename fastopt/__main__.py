"""``python -m fastopt``: the demo, the benchmark, what fastopt runs on here, and building its kernels ahead of use."""

import argparse
import json
import sys

import torch

import fastopt

from . import _native


def main(argv=None):
    """Run one subcommand and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastopt", description="Fused optimizers and losses for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, run, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        add_arguments(command)
        command.set_defaults(run=run, command_parser=command)
    args = parser.parse_args(argv)
    try:
        return args.run(args, args.command_parser)
    except KeyboardInterrupt:
        return 130


def _demo_arguments(parser):
    from .demo import cli

    cli.add_arguments(parser)


def _demo(args, parser):
    from .demo import cli

    return cli.run(args, parser)


def _bench_arguments(parser):
    from .bench import cli

    cli.add_arguments(parser)


def _bench(args, parser):
    from .bench import cli

    return cli.run(args, parser)


def _info_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(args, parser):
    if torch.cuda.is_available():
        torch.cuda.init()  # so that the CUDA kernels can be looked at
    info = fastopt.info()
    if args.json:
        print(json.dumps(info, indent=1, default=str))
        return 0
    width = max(map(len, info))
    for key, value in info.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else value
        print(f"{key:<{width}}  {'none' if shown is None else shown}")
    return 0


def _build_arguments(parser):
    parser.add_argument("--verbose", action="store_true", help="show the compiler's output")


def _build(args, parser):
    try:
        print(fastopt.build(verbose=args.verbose))
        cuda_library = _native.build_cuda()
        if cuda_library is not None:
            print(cuda_library)
    except RuntimeError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


# Each subcommand: what adds its arguments, what runs it, and its line of help.
COMMANDS = {
    "demo": (_demo_arguments, _demo, "train a CNN with stock torch and with fastopt, side by side"),
    "bench": (_bench_arguments, _bench, "time fastopt beside torch and other libraries"),
    "info": (_info_arguments, _info, "tell which kernels serve here, and why"),
    "build": (_build_arguments, _build, "compile the kernels now instead of on first use"),
}

if __name__ == "__main__":
    sys.exit(main())
