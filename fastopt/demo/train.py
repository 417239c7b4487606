"""Trains the network twice from one seed, stock torch and fastopt in turn on the same batches, timing every part."""

import copy
import inspect
import itertools
import time
from dataclasses import dataclass, field

import torch

import fastopt

from . import models, parity, processes

PARTS = ("forward", "loss", "backward", "optimizer")
N_WARMUP_STEPS = 5  # at most this many first steps, and at most half of all, count in no median


@dataclass(frozen=True)
class OptimizerCase:
    """A row of the demo: the class name that torch.optim and fastopt share, and its arguments."""

    name: str
    arguments: dict


OPTIMIZERS = {
    "sgd": OptimizerCase("SGD", {"lr": 0.05}),
    "momentum": OptimizerCase("SGD", {"lr": 0.02, "momentum": 0.9}),
    "rmsprop": OptimizerCase("RMSprop", {"lr": 3e-4}),
    "adam": OptimizerCase("Adam", {"lr": 1e-3}),
}


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


@dataclass
class Side:
    """One of the trainings: its model, loss and optimizer, and the losses and times so far."""

    model: torch.nn.Module
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list = field(default_factory=list)
    times_ms: dict = field(default_factory=lambda: {part: [] for part in PARTS})

    def step(self, images, labels, clock):
        """One training step, which leaves its gradients in place; ``clock`` waits for the device.

        Returns:
            The logits.
        """
        stamps = [clock()]
        self.optimizer.zero_grad()
        stamps.append(clock())
        logits = self.model(images)
        stamps.append(clock())
        loss = self.loss(logits, labels)
        stamps.append(clock())
        loss.backward()
        stamps.append(clock())
        self.optimizer.step()
        stamps.append(clock())
        zero_grad_s, *parts_s = (end - start for start, end in itertools.pairwise(stamps))
        parts_s[-1] += zero_grad_s
        for part, seconds in zip(PARTS, parts_s, strict=True):
            self.times_ms[part].append(seconds * 1e3)
        self.losses.append(loss.item())
        return logits

    def median_ms(self):
        """Median of each part after the warm-up, and their sum as ``step``: a stall in one part moves no median."""
        parts = {part: _median(times) for part, times in self.times_ms.items()}
        return {**parts, "step": sum(parts.values())}


@dataclass(frozen=True)
class Comparison:
    """The outcome for one optimizer; ``torch`` and ``fastopt`` hold losses, times and accuracies."""

    optimizer: str
    arguments: dict
    stock_implementation: str
    torch: dict
    fastopt: dict
    speedup: dict
    parity: parity.Verdict


def compare(name, config, digits, progress=lambda: None):
    """Both trainings with the optimizer ``name`` of :data:`OPTIMIZERS`; of all processes, if there are several.

    In the first steps fastopt also shadows torch, to separate errors from rounding: see :mod:`fastopt.demo.parity`.

    Args:
        config: what to train.
        digits: from :func:`fastopt.demo.data.load`.
        progress: called after every step.
    """
    case = OPTIMIZERS[name]
    arguments = dict(case.arguments) if config.lr is None else {**case.arguments, "lr": config.lr}
    device = torch.device(config.device)
    start = models.build(config.model, config.seed).to(device)
    stock_arguments, stock_implementation = _stock(case.name, config)

    def our_optimizer(model):
        return getattr(fastopt, case.name)(model.parameters(), **arguments)

    model = processes.parallel(copy.deepcopy(start))
    optimizer = getattr(torch.optim, case.name)(model.parameters(), **arguments, **stock_arguments)
    theirs = Side(model, torch.nn.CrossEntropyLoss(), optimizer)
    model = processes.parallel(copy.deepcopy(start))
    ours = Side(model, fastopt.CrossEntropyLoss(), our_optimizer(model))
    shadow = parity.Shadow(start, our_optimizer(start), ours.loss, theirs.loss)

    clock = _clock(device)
    for step, batch in enumerate(_batches(len(digits.train.labels), config)):
        rows = processes.share(batch)
        images = digits.normalize(digits.train.images[rows].to(device))
        labels = digits.train.labels[rows].to(device)
        for side in (theirs, ours) if step % 2 == 0 else (ours, theirs):
            logits = side.step(images, labels, clock)
            if side is theirs and step < parity.N_CHECKED_STEPS:
                shadow.check(list(theirs.model.parameters()), logits, labels)
        progress()
    _exchange(theirs, ours, shadow)

    outcomes = [
        {
            "losses": side.losses,
            "times_ms": side.times_ms,
            "median_ms": side.median_ms(),
            "accuracy_percent": accuracy_percent(side.model, digits, device),
        }
        for side in (theirs, ours)
    ]
    accuracies = [outcome["accuracy_percent"] for outcome in outcomes]
    medians = [outcome["median_ms"] for outcome in outcomes]
    return Comparison(
        name,
        arguments,
        stock_implementation,
        *outcomes,
        speedup={part: medians[0][part] / medians[1][part] for part in medians[0]},
        parity=parity.judge(shadow, theirs.losses, ours.losses, *accuracies),
    )


def _exchange(theirs, ours, shadow):
    """Replace the losses and errors of one process's share by those of all: mean losses, largest errors."""
    for side in (theirs, ours):
        losses = processes.gathered(side.losses)
        side.losses = [sum(parts) / len(parts) for parts in zip(*losses, strict=True)]
    for errors in (shadow.loss_errors, shadow.update_errors):
        errors[:] = map(parity.largest, zip(*processes.gathered(errors), strict=True))


def accuracy_percent(model, digits, device):
    """Share of the test images that ``model`` names right."""
    n_right = 0
    model = getattr(model, "module", model)
    parts = list(zip(digits.test.images.split(1000), digits.test.labels.split(1000), strict=True))
    with torch.inference_mode():
        for images, labels in processes.share(parts):
            predicted = model(digits.normalize(images.to(device))).argmax(1)
            n_right += (predicted == labels.to(device)).sum().item()
    return 100 * sum(processes.gathered(n_right)) / len(digits.test.labels)


def _stock(class_name, config):
    """Arguments that choose torch's implementation, and its name."""
    if config.stock == "default":
        return {}, "default (foreach)" if config.device.startswith("cuda") else "default (for-loop)"
    if config.stock == "fused" and "fused" not in inspect.signature(getattr(torch.optim, class_name)).parameters:
        return {"foreach": True}, "foreach (no fused)"
    return {config.stock: True}, config.stock


def _batches(n_images, config):
    """Rows of each step's batch: all images in an order drawn anew each epoch, an incomplete last batch left out."""
    generator = torch.Generator().manual_seed(config.seed)
    n_per_epoch = n_images // config.batch_size
    for step in range(config.steps):
        if step % n_per_epoch == 0:
            order = torch.randperm(n_images, generator=generator)
        yield order[step % n_per_epoch * config.batch_size :][: config.batch_size]


def _clock(device):
    """Seconds since some moment; on a GPU all its queued work is waited for first."""
    if device.type != "cuda":
        return time.perf_counter

    def clock():
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _median(times):
    kept = sorted(times[min(N_WARMUP_STEPS, len(times) // 2) :])
    return kept[len(kept) // 2]
