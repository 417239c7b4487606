"""Reports the outcome of the demo: tables in plain text, and everything as JSON."""

import dataclasses
import datetime
import json
import math
import os
import platform

import torch

import fastopt

from ..bench.machine import processor
from . import parity, processes

ERRORS = ("max_loss_diff", "loss_err", "update_err")
COLUMNS = ("forward", "loss", "backward", "optimizer", "step")
STOCK = {
    "default": "as it comes (foreach and fused not set)",
    "foreach": "with foreach=True",
    "fused": "with fused=True where it has that, else foreach=True",
}

LEGEND = """\
max_loss_diff: largest difference in loss between the two trainings, in any step. loss_err: fastopt's loss and gradient
on torch's logits. update_err: its weights, fed torch's gradients. Both as a share of what parity allows: 1 is all."""

FOOTNOTES = """\
Medians over the steps after the warm-up; step is their sum. The trainings take turns step by step on the same batches.
A ratio above 1 means that fastopt is faster. optimizer is step() and zero_grad(). fastopt's loss finds its gradient in
the forward pass, so some of what torch does in backward is in its loss: look at the two together."""


def describe(config, digits, info):
    """Lines about the two sides, the data and the machine."""
    n_processes = processes.count()
    batch = f"batch {config.batch_size}" + (f" shared by {n_processes} processes" if n_processes > 1 else "")
    return [
        f"model      {config.model}, {batch}, {config.steps} steps, seed {config.seed}, float32",
        f"data       {digits.source}, {len(digits.train.labels)} to train on, {len(digits.test.labels)} to test, "
        f"by {digits.reader}",
        f"torch      {torch.__version__}, torch.optim {STOCK[config.stock]}, torch.nn.CrossEntropyLoss",
        f"fastopt    {info.get('backend', 'unknown')}: {info.get('reason', 'no reason given')}",
        f"machine    {processor()}, {torch.get_num_threads()} threads, device {config.device}",
    ]


def tables(comparisons):
    """The table of results, the table of times and the verdict, as one text."""
    results = [("optimizer", "torch_impl", "torch_acc_%", "fastopt_acc_%", *ERRORS, "parity")]
    times = [("optimizer", "run", *(f"{column}_ms" for column in COLUMNS))]
    for outcome in comparisons:
        verdict = outcome.parity
        accuracies = (f"{side['accuracy_percent']:.2f}" for side in (outcome.torch, outcome.fastopt))
        state = "ok" if verdict.ok else "diverged" if verdict.diverged else "BROKEN"
        errors = (
            f"{verdict.max_loss_difference:.1e} {verdict.max_loss_error:.3f} {verdict.max_update_error:.3f}".split()
        )
        results.append((outcome.optimizer, outcome.stock_implementation, *accuracies, *errors, state))
        for name, run, values, form in (
            (outcome.optimizer, "torch", outcome.torch["median_ms"], "{:.3f}"),
            ("", "fastopt", outcome.fastopt["median_ms"], "{:.3f}"),
            ("", "torch/fastopt", outcome.speedup, "{:.2f}x"),
        ):
            times.append((name, run, *(form.format(values[column]) for column in COLUMNS)))
    blocks = [_aligned(results, 2), LEGEND, _aligned(times, 2), FOOTNOTES, parity.CRITERION, _verdict(comparisons)]
    return "\n\n".join(blocks)


def to_json(config, digits, comparisons, info):
    """Everything known about the run; numbers that JSON lacks (NaN, infinity) become null."""
    content = {
        "format": 1,
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(config),
        "data": {
            "source": digits.source,
            "reader": digits.reader,
            "n_train": len(digits.train.labels),
            "n_test": len(digits.test.labels),
        },
        "machine": {"processor": processor(), "platform": platform.platform(), "cpus": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "fastopt": fastopt.__version__,
        },
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "fastopt": info,
        "criterion": parity.CRITERION,
        "parity": all(outcome.parity.ok for outcome in comparisons),
        "results": [dataclasses.asdict(outcome) for outcome in comparisons],
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False, default=str)


def _verdict(comparisons):
    if all(outcome.parity.ok for outcome in comparisons):
        return "Parity holds."
    lines = []
    for diverged, title in (
        (False, "Parity is BROKEN:"),
        (True, "Both trainings diverged, so there is nothing to compare; a smaller --lr may help:"),
    ):
        those = [outcome for outcome in comparisons if outcome.parity.diverged == diverged]
        reasons = [f"  {outcome.optimizer}: {reason}" for outcome in those for reason in outcome.parity.reasons]
        lines += [title, *reasons] if reasons else []
    return "\n".join(lines)


def _aligned(rows, n_left):
    """Columns in fixed width, the first ``n_left`` flush left and the numbers flush right."""
    columns = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if index < n_left else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
