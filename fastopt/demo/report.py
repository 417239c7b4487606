"""What the demo shows: progress, tables in plain text, a picture, and everything as JSON."""

import dataclasses
import datetime
import json
import os
import platform
import sys
import time

import numpy as np
import torch

import fastopt

from ..bench.machine import processor
from . import parity, processes

COLUMNS = ("forward", "loss", "backward", "optimizer", "step")
STOCK = {
    "default": "as it comes (foreach and fused not set)",
    "foreach": "with foreach=True",
    "fused": "with fused=True where it has that, else foreach=True",
}

SMOOTHING = 0.9
RUNS = (("torch", "#ee4c2c", 3.5, -0.2), ("fastopt", "#1f77b4", 1.2, 0.2))  # color, width of its line, place of its bar

LEGEND = """\
max_loss_diff: largest difference in loss between the two trainings, in any step. loss_err: fastopt's loss and gradient
on torch's logits. update_err: its weights, fed torch's gradients. Both as a share of what parity allows: 1 is all."""

FOOTNOTES = """\
Medians over the steps after the warm-up; step is their sum. The trainings take turns step by step on the same batches.
A ratio above 1 means that fastopt is faster. optimizer is step() and zero_grad(). fastopt's loss finds its gradient in
the forward pass, so some of what torch does in backward is in its loss: look at the two together."""


class Progress:
    """Counts ``n_steps`` steps on stderr: a bar redrawn in place on a terminal, four lines elsewhere."""

    def __init__(self, label, n_steps, *, quiet=False, stream=None):
        self.label, self.n_steps, self.stream = label, n_steps, stream or sys.stderr
        self.n_done, self.started = 0, time.monotonic()
        self.n_shown = 0 if quiet else 100 if self.stream.isatty() else 4

    def step(self):
        """One more step is done."""
        self.n_done += 1
        if self.n_done * self.n_shown // self.n_steps == (self.n_done - 1) * self.n_shown // self.n_steps:
            return
        text = f"{self.n_done}/{self.n_steps} steps, {time.monotonic() - self.started:.0f} s"
        if self.stream.isatty():
            bar = "#" * (30 * self.n_done // self.n_steps)
            end = "\n" if self.n_done == self.n_steps else ""
            print(f"\r{self.label:<9} [{bar:.<30}] {text}", end=end, file=self.stream, flush=True)
        else:
            print(f"{self.label}: {text}", file=self.stream, flush=True)


def describe(config, digits, info):
    """Lines about the two sides, the data and the machine."""
    n_train, n_test, n_processes = len(digits.train.labels), len(digits.test.labels), processes.count()
    batch = f"batch {config.batch_size}" + (f" shared by {n_processes} processes" if n_processes > 1 else "")
    return [
        f"model      {config.model}, {batch}, {config.steps} steps, seed {config.seed}, float32",
        f"data       {digits.source}, {n_train} to train on, {n_test} to test, by {digits.reader}",
        f"torch      {torch.__version__}, torch.optim {STOCK[config.stock]}, torch.nn.CrossEntropyLoss",
        f"fastopt    {info.get('backend', 'unknown')}: {info.get('reason', 'no reason given')}",
        f"machine    {processor()}, {torch.get_num_threads()} threads, device {config.device}",
    ]


def tables(comparisons):
    """The table of results, the table of times and the verdict, as one text."""
    errors = "max_loss_diff", "loss_err", "update_err"
    results = [("optimizer", "torch_impl", "torch_acc_%", "fastopt_acc_%", *errors, "parity")]
    times = [("optimizer", "run", *(f"{column}_ms" for column in COLUMNS))]
    for outcome in comparisons:
        verdict, name = outcome.parity, outcome.optimizer
        accuracies = (f"{side['accuracy_percent']:.2f}" for side in (outcome.torch, outcome.fastopt))
        errors = f"{verdict.max_loss_error:.3f}", f"{verdict.max_update_error:.3f}"
        state = "ok" if verdict.ok else "diverged" if verdict.diverged else "BROKEN"
        difference = f"{verdict.max_loss_difference:.1e}"
        results.append((name, outcome.stock_implementation, *accuracies, difference, *errors, state))
        for cells, values, form in (
            ((name, "torch"), outcome.torch["median_ms"], "{:.3f}"),
            (("", "fastopt"), outcome.fastopt["median_ms"], "{:.3f}"),
            (("", "torch/fastopt"), outcome.speedup, "{:.2f}x"),
        ):
            times.append((*cells, *(form.format(values[column]) for column in COLUMNS)))
    blocks = [_aligned(results, 2), LEGEND, _aligned(times, 2), FOOTNOTES, parity.CRITERION, _verdict(comparisons)]
    return "\n\n".join(blocks)


def to_json(config, digits, comparisons, info):
    """Everything known about the run; numbers that JSON lacks (NaN, infinity) become null."""
    n_train, n_test = len(digits.train.labels), len(digits.test.labels)
    content = {
        "format": 1,
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(config),
        "data": dict(source=digits.source, reader=digits.reader, n_train=n_train, n_test=n_test),
        "machine": dict(processor=processor(), platform=platform.platform(), cpus=os.cpu_count()),
        "versions": dict(python=platform.python_version(), torch=torch.__version__, fastopt=fastopt.__version__),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "fastopt": info,
        "criterion": parity.CRITERION,
        "parity": all(outcome.parity.ok for outcome in comparisons),
        "results": [vars(outcome) | {"parity": dataclasses.asdict(outcome.parity)} for outcome in comparisons],
    }
    finite = json.loads(json.dumps(content, default=str), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1)


def _verdict(comparisons):
    if all(outcome.parity.ok for outcome in comparisons):
        return "Parity holds."
    titles = "Parity is BROKEN:", "Both trainings diverged, so there is nothing to compare; a smaller --lr may help:"
    lines = []
    for diverged, title in enumerate(titles):
        those = [outcome for outcome in comparisons if outcome.parity.diverged == diverged]
        reasons = [f"  {outcome.optimizer}: {reason}" for outcome in those for reason in outcome.parity.reasons]
        lines += [title, *reasons] if reasons else []
    return "\n".join(lines)


def _aligned(rows, n_left):
    """Columns in fixed width, the first ``n_left`` flush left and the numbers flush right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    forms = "  ".join(f"{{:{'<' if index < n_left else '>'}{width}}}" for index, width in enumerate(widths))
    return "\n".join(forms.format(*cells).rstrip() for cells in rows)


def save_picture(file, config, comparisons):
    """Write the picture to ``file``; ImportError if there is no matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 4.2 * len(comparisons), 7.5), layout="constrained")
    axes = figure.subplots(2, len(comparisons), squeeze=False)
    for (above, below), outcome in zip(axes.T, comparisons, strict=True):
        for run, color, width, offset in RUNS:
            found = getattr(outcome, run)
            label = f"{run}, test accuracy {found['accuracy_percent']:.2f} %"
            steps = range(1, len(found["losses"]) + 1)
            above.plot(steps, _smooth(found["losses"]), color=color, linewidth=width, label=label)
            places = [index + offset for index in range(len(COLUMNS))]
            below.bar(places, [found["median_ms"][column] for column in COLUMNS], 0.4, color=color, label=run)
        for index, column in enumerate(COLUMNS):
            top = index, max(outcome.torch["median_ms"][column], outcome.fastopt["median_ms"][column])
            place = dict(xytext=(0, 3), textcoords="offset points", ha="center", fontsize="small")
            below.annotate(f"{outcome.speedup[column]:.2f}x", top, **place)
        above.set(title=outcome.optimizer, xlabel="step", ylabel="training loss, smoothed", ylim=(0, None))
        below.set_xticks(range(len(COLUMNS)), COLUMNS)
        below.set(yscale="log", ylabel="median ms (log scale), torch/fastopt above")
        below.margins(y=0.12)
        for axis, grid in ((above, "both"), (below, "y")):
            axis.legend(fontsize="small")
            axis.grid(axis=grid, alpha=0.3)
    figure.suptitle(f"{config.model}, batch {config.batch_size}, {config.steps} steps, seed {config.seed}")
    figure.savefig(file, dpi=110, format="png")


def _smooth(losses):
    """Exponential moving average, its start not biased towards zero."""
    weights = SMOOTHING ** np.arange(len(losses))
    return np.convolve(losses, weights)[: len(losses)] / np.cumsum(weights)
