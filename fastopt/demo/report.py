"""Reports the outcome of the demo: tables in plain text, and everything as JSON."""

import dataclasses
import datetime
import json
import math
import os
import platform

import torch

import fastopt

from . import parity, processes

COLUMNS = ("forward", "loss", "backward", "optimizer", "step")
SPEEDUP_ROW = "torch/fastopt"
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
    results = [
        ("optimizer", "torch_impl", "torch_acc_%", "fastopt_acc_%", "max_loss_diff", "loss_err", "update_err", "parity")
    ]
    times = [("optimizer", "run", *(f"{column}_ms" for column in COLUMNS))]
    for outcome in comparisons:
        verdict = outcome.parity
        results.append(
            (
                outcome.optimizer,
                outcome.stock_implementation,
                f"{outcome.torch['accuracy_percent']:.2f}",
                f"{outcome.fastopt['accuracy_percent']:.2f}",
                f"{verdict.max_loss_difference:.1e}",
                f"{verdict.max_loss_error:.3f}",
                f"{verdict.max_update_error:.3f}",
                "ok" if verdict.ok else "diverged" if verdict.diverged else "BROKEN",
            )
        )
        for run, name in (("torch", outcome.optimizer), ("fastopt", "")):
            median_ms = getattr(outcome, run)["median_ms"]
            times.append((name, run, *(f"{median_ms[column]:.3f}" for column in COLUMNS)))
        times.append(("", SPEEDUP_ROW, *(f"{outcome.speedup[column]:.2f}x" for column in COLUMNS)))
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
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "fastopt": version()},
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "fastopt": info,
        "criterion": parity.CRITERION,
        "parity": all(outcome.parity.ok for outcome in comparisons),
        "results": [dataclasses.asdict(outcome) for outcome in comparisons],
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False, default=str)


def version():
    """fastopt's version, or None where it states none."""
    return getattr(fastopt, "__version__", None)


def processor():
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _verdict(comparisons):
    if all(outcome.parity.ok for outcome in comparisons):
        return "Parity holds."
    lines = []
    for diverged, title in (
        (False, "Parity is BROKEN:"),
        (True, "Both trainings diverged, so there is nothing to compare; a smaller --lr may help:"),
    ):
        outcomes = [outcome for outcome in comparisons if not outcome.parity.ok and outcome.parity.diverged == diverged]
        reasons = [f"  {outcome.optimizer}: {reason}" for outcome in outcomes for reason in outcome.parity.reasons]
        lines += [title, *reasons] if reasons else []
    return "\n".join(lines)


def _aligned(rows, n_left):
    """Columns in fixed width, the first ``n_left`` flush left and the numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < n_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
