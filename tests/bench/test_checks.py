"""The checks before timing: right results pass, wrong ones do not."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from bench_cases import CROSS_ENTROPY, SMALL_LOSSES, SMALL_STEPS, faulty_loss, is_right, named
from fastopt.bench import providers, work
from fastopt.bench.cases import LossCase
from fastopt.bench.providers import NotOffered, Provider


@named(SMALL_STEPS)
def test_right_optimizers_pass_the_check(case):
    for provider in providers.OPTIMIZERS:
        if not provider.compiles:
            ready = work.prepare(case, "cpu")
            try:
                started = ready.start(provider)
            except NotOffered:
                assert provider.name.startswith("torch")
                assert provider.name == "torch fused" or not hasattr(torch.optim, case.optimizer.name)
                continue
            assert is_right(ready, started), provider.name


@named(SMALL_LOSSES)
def test_right_losses_pass_the_check(case):
    for provider in providers.LOSSES:
        if not provider.compiles:
            ready = work.prepare(case, "cpu")
            assert is_right(ready, ready.start(provider)), provider.name


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss * 1.001,
        lambda loss: loss.detach() + 1.001 * (loss - loss.detach()),
        lambda loss: loss * math.nan,
    ],
    ids=["loss", "gradient only", "nan"],
)
def test_wrong_losses_fail_the_check(change):
    ready = work.prepare(SMALL_LOSSES[0], "cpu")
    assert not is_right(ready, ready.start(faulty_loss(change)))


@named(SMALL_STEPS)
def test_wrong_optimizers_fail_the_check(case):
    def slow_learner(case, params):
        optimizer = case.optimizer.timed(case.optimizer.reference_class, params)
        optimizer.param_groups[0]["lr"] *= 0.999
        return optimizer.step

    for faulty in (slow_learner, lambda case, params: lambda: None):
        ready = work.prepare(case, "cpu")
        assert not is_right(ready, ready.start(Provider("faulty", faulty)))


@named([dataclasses.replace(case, dtype=torch.bfloat16) for case in SMALL_STEPS])
def test_16_bit_steps_pass_the_check_and_one_that_does_nothing_fails(case):
    ready = work.prepare(case, "cpu")
    of_torch = ("torch for-loop", "torch foreach") if case.optimizer.torch_class else ()
    for name in (*of_torch, "fastopt"):
        provider = next(provider for provider in providers.OPTIMIZERS if provider.name == name)
        assert is_right(ready, ready.start(provider)), name
    assert not is_right(ready, ready.start(Provider("faulty", lambda case, params: lambda: None)))


def test_gradient_in_the_logits_memory_is_checked_and_logits_are_restored():
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target):
            loss = F.cross_entropy(logits, target)
            ctx.gradient = logits.softmax(1)
            ctx.gradient[range(len(target)), target] -= 1
            logits.copy_(ctx.gradient.div_(len(target)))
            ctx.gradient = logits.detach()
            return loss

        @staticmethod
        def backward(ctx, grad):
            return ctx.gradient * grad, None

    ready = work.prepare(LossCase(CROSS_ENTROPY, (7, 10), trait="in place"), "cpu")
    started = ready.start(Provider("in place", lambda case: InPlace.apply))
    assert is_right(ready, started)
    started.call()
    assert is_right(ready, started)
    assert started.results()[1].shape == (7, 10)


def test_large_gradients_are_checked_in_whole_rows_evenly_spaced(monkeypatch):
    monkeypatch.setattr(work, "N_CHECKED_LOGITS", 30)
    ready = work.prepare(LossCase(CROSS_ENTROPY, (10, 10)), "cpu")
    assert is_right(ready, ready.start(providers.LOSSES[0]))
    assert ready._expected[1].shape == (3, 10)
