"""Whole trainings of the MNIST CNN with fastopt's loss and optimizer beside torch's, from the same seed."""

import os
from pathlib import Path

import pytest
import torch

import fastopt
from common import kernel_calls
from fastopt.demo import data, models
from optim_cases import OPTIM_CASES, one_of_each_class_is_quick
from paths import ROOT

N_STEPS, N_EARLY_STEPS = 50, 10
BATCH = 8
REAL_MNIST = next(
    (
        folder
        for folder in (os.environ.get("FASTOPT_DATA"), ROOT.parent / "shared" / "data")
        if folder and Path(folder).exists()
    ),
    None,
)


@pytest.fixture(scope="module")
def batches():
    digits = data.load(REAL_MNIST) if REAL_MNIST else data.draw(N_STEPS * BATCH, 100)
    images = digits.normalize(digits.train.images[: N_STEPS * BATCH]).double()
    labels = digits.train.labels[: N_STEPS * BATCH]
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def options_of(case):
    """Rates at which the network stays in the numbers, also when it ascends."""
    options = dict(case.options)
    if case.name == "SGD":
        options["lr"] *= 1e-2 if options.get("maximize") else 0.1
    return options


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def train(case, side, dtype, batches, after_backward=lambda model: None):
    """The losses, and the weights as one vector after the first steps and after all."""
    model = models.build("cnn", seed=0).to(dtype)
    cls, module = (case.ours, fastopt) if side == "fastopt" else (case.theirs, torch.nn)
    optimizer, loss_function = cls(model.parameters(), **options_of(case)), module.CrossEntropyLoss()
    losses, weights = [], []
    for step, (images, labels) in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss = loss_function(model(images.to(dtype)), labels)
        loss.backward()
        after_backward(model)
        optimizer.step()
        losses.append(loss.detach().double())
        if step in (N_EARLY_STEPS, N_STEPS):
            weights.append(flat(model))
    return torch.stack(losses), weights


class Shadow:
    """A float32 optimizer that is fed another training's gradients: what it differs by is its own arithmetic."""

    def __init__(self, case, cls):
        self.model = models.build("cnn", seed=0)
        self.optimizer = cls(self.model.parameters(), **options_of(case))

    def follow(self, model):
        for mine, p in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.grad = p.grad.float()
        self.optimizer.step()


@pytest.mark.parametrize("case", one_of_each_class_is_quick(case for case in OPTIM_CASES if case.name != "Lion"))
def test_fifty_steps_of_the_cnn_agree_with_torch(case, batches):
    shadows = [Shadow(case, case.ours), Shadow(case, case.theirs)]
    true_losses, (early_truth, truth) = train(
        case, "torch", torch.float64, batches, lambda model: [shadow.follow(model) for shadow in shadows]
    )
    assert true_losses.isfinite().all()

    # float64: the whole training, loss and optimizer ours, to 1e-9.
    losses, (_, weights) = train(case, "fastopt", torch.float64, batches)
    assert ((losses - true_losses).abs() <= 1e-9 * true_losses.abs().clamp(min=1)).all()
    assert (weights - truth).norm() <= 1e-9 * truth.norm()

    # float32, the optimizer alone: no further from float64 than torch's; slack a tenth, and 1e-8 of the weights.
    ours, theirs = ((flat(shadow.model) - truth).norm() for shadow in shadows)
    assert ours <= 1.1 * theirs + 1e-8 * truth.norm()

    # float32, the whole training: rounding decides over which ReLU is on, which moves some runs and not others. Until
    # then no further than torch's own, slack a factor 2 and 1e-3 of the weights; at the end, slack a twentieth of them.
    _, (early_ours, ours) = train(case, "fastopt", torch.float32, batches)
    _, (early_theirs, theirs) = train(case, "torch", torch.float32, batches)
    assert (early_ours - early_truth).norm() <= 2 * (early_theirs - early_truth).norm() + 1e-3 * truth.norm()
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 0.05 * truth.norm()


@pytest.mark.native
def test_the_cnn_trains_on_the_kernels(batches):
    before = {name: kernel_calls(name) for name in ("update", "cross_entropy")}
    train(OPTIM_CASES[0], "fastopt", torch.float32, batches[:5])
    assert {name: kernel_calls(name) - calls for name, calls in before.items()} == {"update": 5, "cross_entropy": 5}


@pytest.mark.slow
@pytest.mark.skipif(REAL_MNIST is None, reason="no MNIST files in $FASTOPT_DATA or beside the checkout")
def test_one_epoch_of_adam_classifies_98_percent_of_mnist():
    digits = data.load(REAL_MNIST)
    images, test_images = digits.normalize(digits.train.images), digits.normalize(digits.test.images)
    for cls, module in ((fastopt.Adam, fastopt), (torch.optim.Adam, torch.nn)):
        model = models.build("cnn", seed=0)
        optimizer, loss_function = cls(model.parameters()), module.CrossEntropyLoss()
        order = torch.randperm(len(digits.train.labels), generator=torch.Generator().manual_seed(0))
        for batch in order.split(128):
            optimizer.zero_grad()
            loss_function(model(images[batch]), digits.train.labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            predicted = torch.cat([model(part).argmax(1) for part in test_images.split(1000)])
        assert (predicted == digits.test.labels).double().mean() >= 0.98
