"""Trains the network twice from one seed, stock torch and fastopt in turn on the same batches, timing every part."""

import copy
import inspect
import itertools
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import fastopt

from ..bench import tables
from . import models, parity, processes

PARTS = ("forward", "loss", "backward", "optimizer")
N_WARMUP_STEPS = 5  # at most this many first steps, and at most half of all, count in no median
OPTIMIZERS = {row.label.lower(): row for row in tables.OPTIMIZERS if row.demo_lr is not None}


@dataclass(frozen=True)
class Config:
    """The training to run; ``lr`` None takes each optimizer's own."""

    model: str = "cnn"
    steps: int = 200
    batch_size: int = 64
    lr: float | None = None
    seed: int = 0
    device: str = "cpu"
    stock: str = "default"


class Side:
    """One of the trainings: its model, loss and optimizer, and the losses and times so far."""

    def __init__(self, model, loss, optimizer):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.losses, self.times_ms = [], {part: [] for part in PARTS}

    def step(self, images, labels, clock):
        """One training step, which leaves its gradients in place; returns the logits."""
        stamps = [clock()]

        def timed(function, *args):
            result = function(*args)
            stamps.append(clock())
            return result

        timed(self.optimizer.zero_grad)
        logits = timed(self.model, images)
        loss = timed(self.loss, logits, labels)
        timed(loss.backward)
        timed(self.optimizer.step)
        zero_grad_ms, *parts_ms = (1e3 * (end - start) for start, end in itertools.pairwise(stamps))
        parts_ms[-1] += zero_grad_ms
        for part, ms in zip(PARTS, parts_ms, strict=True):
            self.times_ms[part].append(ms)
        self.losses.append(loss.item())
        return logits

    def outcome(self, digits, device):
        """Its losses, times and accuracy; ``step`` is the sum of medians, so that a stall in one part moves nothing."""
        median_ms = {part: _median(times) for part, times in self.times_ms.items()}
        median_ms["step"], accuracy = sum(median_ms.values()), accuracy_percent(self.model, digits, device)
        return dict(losses=self.losses, times_ms=self.times_ms, median_ms=median_ms, accuracy_percent=accuracy)


def compare(name, config, digits, progress=lambda: None):
    """Both trainings with the optimizer ``name`` of :data:`OPTIMIZERS`; of all processes, if there are several.

    In the first steps fastopt also shadows torch, to separate errors from rounding: see :mod:`fastopt.demo.parity`.
    ``progress`` is called after every step. In the outcome ``torch`` and ``fastopt`` hold losses, times and accuracies.
    """
    row, device = OPTIMIZERS[name], torch.device(config.device)
    arguments = {"lr": row.demo_lr if config.lr is None else config.lr, **row.options}
    stock, stock_implementation = _stock(row.torch_class, config)
    ours_class = getattr(fastopt, row.name)
    start = models.build(config.model, config.seed).to(device)

    def side(loss, optimizer_class, **more):
        model = copy.deepcopy(start)
        if processes.is_launched():
            model = torch.nn.parallel.DistributedDataParallel(model)
        return Side(model, loss, optimizer_class(model.parameters(), **arguments, **more))

    theirs = side(torch.nn.CrossEntropyLoss(), row.torch_class, **stock)
    ours = side(fastopt.CrossEntropyLoss(), ours_class)
    shadow = parity.Shadow(start, ours_class(start.parameters(), **arguments), ours.loss, theirs.loss)

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for step, batch in enumerate(_batches(len(digits.train.labels), config)):
        rows = processes.share(batch)
        images = digits.normalize(digits.train.images[rows].to(device))
        labels = digits.train.labels[rows].to(device)
        for each in (theirs, ours) if step % 2 == 0 else (ours, theirs):
            logits = each.step(images, labels, clock)
            if each is theirs and step < parity.N_CHECKED_STEPS:
                shadow.check(list(theirs.model.parameters()), logits, labels)
        progress()
    # Of each process's share: the mean of losses, the largest of errors.
    for each in (theirs, ours):
        each.losses = np.mean(processes.gathered(each.losses), axis=0).tolist()
    for errors in (shadow.loss_errors, shadow.update_errors):
        errors[:] = np.max(processes.gathered(errors), axis=0).tolist()

    outcomes = {"torch": theirs.outcome(digits, device), "fastopt": ours.outcome(digits, device)}
    theirs_ms, ours_ms = (outcome["median_ms"] for outcome in outcomes.values())
    accuracies = (outcome["accuracy_percent"] for outcome in outcomes.values())
    return SimpleNamespace(
        optimizer=name,
        arguments=arguments,
        stock_implementation=stock_implementation,
        **outcomes,
        speedup={part: theirs_ms[part] / ours_ms[part] for part in theirs_ms},
        parity=parity.judge(shadow, theirs.losses, ours.losses, *accuracies),
    )


def accuracy_percent(model, digits, device):
    """Share of the test images that ``model`` classifies correctly."""
    n_right = 0
    model = getattr(model, "module", model)
    parts = list(zip(digits.test.images.split(1000), digits.test.labels.split(1000), strict=True))
    with torch.inference_mode():
        for images, labels in processes.share(parts):
            predicted = model(digits.normalize(images.to(device))).argmax(1)
            n_right += (predicted == labels.to(device)).sum().item()
    return 100 * sum(processes.gathered(n_right)) / len(digits.test.labels)


def _stock(cls, config):
    """Arguments that choose torch's implementation, and its name."""
    known = inspect.signature(cls).parameters
    if config.stock == "default":
        is_foreach = "foreach" in known and config.device.startswith("cuda")
        return {}, f"default ({'foreach' if is_foreach else 'for-loop'})"
    if config.stock in known:
        return {config.stock: True}, config.stock
    return ({"foreach": True}, f"foreach (no {config.stock})") if "foreach" in known else ({}, "for-loop")


def _batches(n_images, config):
    """Rows of each step's batch: all images in an order drawn anew each epoch, an incomplete last batch left out."""
    generator = torch.Generator().manual_seed(config.seed)
    n_per_epoch = n_images // config.batch_size
    for step in range(config.steps):
        if step % n_per_epoch == 0:
            order = torch.randperm(n_images, generator=generator)
        yield order[step % n_per_epoch * config.batch_size :][: config.batch_size]


def _median(times):
    return statistics.median_high(times[min(N_WARMUP_STEPS, len(times) // 2) :])
