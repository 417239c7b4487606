"""``python -m fastopt demo``: arguments, the run, and its exit status."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

import torch

import fastopt

from .._arguments import at_least, new_file, non_negative
from . import data, processes, report, train
from .models import MODELS

DESCRIPTION = """\
Train a CNN on handwritten digits twice from one seed, with stock torch and with fastopt, and compare losses, test
accuracy and the time of each part of a step. Exits with 1 if the two trainings do not agree, with 2 if the losses of
both became NaN or infinite. Launched by torchrun with several processes, each trains on its share of every batch, and
the first one reports; torchrun itself exits with 1 for every status but 0."""

STOCK_HELP = """\
which of torch's own implementations fastopt is compared with; default: the one torch.optim takes by itself"""
DATA_HELP = """\
folder of the four IDX files of MNIST, packed or not, in it, in raw or in MNIST/raw; without it $FASTOPT_DATA, ./data,
../data and ~/data are tried, and where none of them has digits fastopt draws its own"""

MAX_LR = 1e30


def add_arguments(parser):
    """The demo's arguments on ``parser``."""
    parser.description = DESCRIPTION
    defaults, add = train.Config(), parser.add_argument
    add("--model", choices=tuple(MODELS), default=defaults.model, help="default: %(default)s")
    add("--optimizer", choices=(*train.OPTIMIZERS, "all"), default="all", help="default: %(default)s")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=at_least(1), help=f"steps to train; default: {defaults.steps}")
    length.add_argument("--epochs", type=at_least(1), help="train so many times over all images instead")
    add("--batch-size", type=at_least(1), default=defaults.batch_size, help="default: %(default)s")
    add("--lr", type=learning_rate, help="learning rate of every optimizer; default: each its own")
    add("--seed", type=at_least(0), default=defaults.seed, help="default: %(default)s")
    add("--stock", choices=tuple(report.STOCK), default=defaults.stock, help=STOCK_HELP)
    add("--device", type=_device, default=defaults.device, help="cpu or cuda; default: %(default)s")
    add("--threads", type=at_least(1), help="threads of torch and fastopt; default: torch's")
    add("--data", type=Path, metavar="DIR", help=DATA_HELP)
    add("--download", action="store_true", help="fetch MNIST into MNIST/raw in --data or ./data")
    add("--json", type=new_file, metavar="FILE", help="write everything known about the run")
    add("--png", type=new_file, metavar="FILE", help="write loss curves and times as a picture")
    add("--quiet", action="store_true", help="no progress bar")


def run(args, parser):
    """Train, report, and return the exit status."""
    with processes.joined(args.device) as args.device:
        return _run(args, parser)


def _run(args, parser):
    is_first, n_processes = processes.rank() == 0, processes.count()
    if args.data and not args.download and not args.data.is_dir():
        parser.error(f"argument --data: must be a directory, got {str(args.data)!r}")
    try:
        with processes.first_before_others():
            digits = data.load(args.data, download=args.download)
    except data.DataError as error:
        return _fail(parser, error, 3 if isinstance(error, data.DownloadError) else 2)
    n_train = len(digits.train.labels)
    if args.batch_size > n_train:
        parser.error(f"argument --batch-size: must be at most the {n_train} training images, got {args.batch_size}")
    if args.batch_size % n_processes:
        parser.error(f"argument --batch-size: must be a multiple of the {n_processes} processes, got {args.batch_size}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.steps = args.steps or (args.epochs and args.epochs * (n_train // args.batch_size)) or train.Config.steps
    config = train.Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(train.Config)})
    fastopt.CrossEntropyLoss()(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))  # builds the kernels if need be
    info = fastopt.info()
    if is_first:
        print("\n".join(report.describe(config, digits, info)), flush=True)

    comparisons = []
    for name in train.OPTIMIZERS if args.optimizer == "all" else (args.optimizer,):
        progress = report.Progress(name, config.steps, quiet=args.quiet or not is_first)
        comparisons.append(train.compare(name, config, digits, progress.step))
    verdicts = [outcome.parity for outcome in comparisons if not outcome.parity.ok]
    status = 0 if not verdicts else 2 if all(verdict.diverged for verdict in verdicts) else 1
    if not is_first:
        return status
    try:  # before the tables: a closed pipe must not lose the files
        if args.json:
            args.json.write_text(report.to_json(config, digits, comparisons, info) + "\n")
        if args.png:
            report.save_picture(args.png, config, comparisons)
    except ImportError as error:
        print(f"{parser.prog}: no picture, for there is no matplotlib ({error})", file=sys.stderr)
    except OSError as error:
        status = status or _fail(parser, error, 2)
    print("\n" + report.tables(comparisons))
    return status


def _fail(parser, error, status):
    print(f"{parser.prog}: error: {error}", file=sys.stderr)
    return status


def learning_rate(text):
    value = non_negative(text)
    if value > MAX_LR:
        raise argparse.ArgumentTypeError(f"must be <= {MAX_LR:g}, with which a step stays in float32, got {value:g}")
    return value


def _device(text):
    with contextlib.suppress(RuntimeError):
        kind, index, n_gpus = torch.device(text).type, torch.device(text).index or 0, torch.cuda.device_count()
        if kind == "cuda" and index >= n_gpus:
            raise argparse.ArgumentTypeError(f"torch sees {n_gpus} CUDA devices, got {text!r}")
        if kind in ("cpu", "cuda"):
            return text
    raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
