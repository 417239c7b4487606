"""The demo's verdict where the two trainings differ, in each way that they can."""

import json
import math

import pytest
import torch

import fastopt
from fastopt.__main__ import main
from fastopt.demo import parity

pytestmark = pytest.mark.usefixtures("few_drawn_digits")

QUICK = ["demo", "--model", "lenet", "--steps", "4", "--batch-size", "16", "--quiet"]


class WrongRate(torch.optim.Adam):
    def __init__(self, params, lr=1e-3, **arguments):
        super().__init__(params, lr=1.01 * lr, **arguments)


class SkippedBias(torch.optim.Adam):
    """Leaves the last tensor, ten numbers of a million, as it was."""

    def step(self):
        last = self.param_groups[0]["params"][-1]
        before = last.detach().clone()
        super().step()
        with torch.no_grad():
            last.copy_(before)


class WrongLoss(torch.nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) * 1.0001


class WrongGradient(torch.nn.CrossEntropyLoss):
    def forward(self, input, target):
        loss = super().forward(input, target)
        return loss.detach() + 1.001 * (loss - loss.detach())


class NanLoss(torch.nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) * math.nan


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("Adam", WrongRate, "fed the same gradients the weights differ in step 1"),
        ("Adam", SkippedBias, "fed the same gradients the weights differ in step 1"),
        ("CrossEntropyLoss", WrongLoss, "on the same logits the losses differ in step 1"),
        ("CrossEntropyLoss", WrongGradient, "on the same logits the losses differ in step 1"),
        ("CrossEntropyLoss", NanLoss, "fastopt's loss in step 1 is nan"),
    ],
)
def test_broken_parity_is_reported_with_exit_status_1(name, broken, reason, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fastopt, name, broken)
    assert main([*QUICK, "--optimizer", "adam", "--json", "out.json", "--png", "out.png"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out
    assert reason in out
    reported = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert reported["parity"] is False


def judge(torch_losses=(2.0, 1.0), fastopt_losses=(2.0, 1.0), torch_accuracy=98.0, fastopt_accuracy=98.0):
    shadow = parity.Shadow(torch.nn.Linear(1, 1), None, None, None)
    shadow.loss_errors, shadow.update_errors = [0.5], [0.5]
    return parity.judge(shadow, list(torch_losses), list(fastopt_losses), torch_accuracy, fastopt_accuracy)


def test_small_differences_keep_parity():
    assert judge().ok
    assert judge(fastopt_losses=(2.0, 1.2), fastopt_accuracy=96.5).ok


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fastopt_losses": (2.0, 1.3)}, "mean losses of the last 1 steps differ by 0.300, 0.250 allowed"),
        ({"fastopt_accuracy": 95.0}, "test accuracies differ by 3.00 points, 2.00 allowed"),
        ({"torch_losses": (math.inf, 1.0)}, "torch's loss in step 1 is inf"),
        ({"fastopt_losses": (2.0, math.nan)}, "fastopt's loss in step 2 is nan"),
    ],
)
def test_different_final_losses_or_accuracies_break_parity(changed, reason):
    verdict = judge(**changed)
    assert not verdict.ok
    assert reason in verdict.reasons
