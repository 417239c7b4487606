"""The benchmark's tables and its processes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import fastopt
from bench_cases import SMALL_LOSSES, faulty_loss, is_right
from fastopt.bench import measure, providers, report, runner, tables, work
from fastopt.bench.cases import benchmark_cases
from fastopt.bench.providers import NotOffered, Provider
from fastopt.bench.runner import Settings

EVERY = {case.name: case for device in ("cpu", "cuda") for case in benchmark_cases(device)}


@pytest.fixture
def short_stretches(monkeypatch):
    monkeypatch.setattr(measure, "STRETCH_S", 1e-4)


# Tables.


def test_bytes_of_each_case_are_those_worked_out_by_hand():
    by_name = {name: case.bytes_moved for name, case in EVERY.items()}
    lenet = 156 + 2416 + 30840 + 10164 + 850
    assert lenet == 44_426
    assert by_name["SGD: LeNet, 44 k in 10 tensors"] == 12 * lenet
    assert by_name["momentum: LeNet, 44 k in 10 tensors"] == 20 * lenet
    assert by_name["RMSprop: MNIST CNN, 1.2 M in 8"] == 20 * 1_199_882
    assert by_name["RMSprop centered, momentum: 1000 tensors of 64"] == 36 * 64_000
    assert by_name["Adam: GPT-2 small, 124 M in 148"] == 28 * 124_439_808
    assert by_name["AdamW: GPT-2 small, 124 M in 148 bf16"] == 14 * 124_439_808
    assert by_name["cross-entropy 64 x 10"] == 4 * 640 + 8 * 64 + 4 * 640
    assert by_name["cross-entropy 512 x 32000"] == 131_076_096
    assert by_name["cross-entropy 512 x 32000, in place"] == 131_076_096
    assert by_name["cross-entropy 512 x 32000 bf16"] == 65_540_096
    assert by_name["cross-entropy 512 x 32000, probabilities"] == 3 * 65_536_000
    assert by_name["cross-entropy 512 x 32000, no gradient"] == 65_536_000 + 4096
    assert by_name["cross-entropy 8 x 21 x 256 x 256"] == 2 * 44_040_192 + 8 * 524_288
    assert by_name["cross-entropy 8192 x 50257 bf16"] == 2 * 823_410_688 + 8 * 8192


def test_tables_name_each_case_once_and_end_its_working_with_its_bytes():
    for device in ("cpu", "cuda"):
        names = [case.name for case in benchmark_cases(device)]
        assert len(set(names)) == len(names)
    assert all(case.working.endswith(f" = {case.bytes_moved:,} B") for case in EVERY.values())
    assert [len(shapes) for _, shapes, _ in tables.MODELS] == [10, 8, 1000, 148]


class PlainLion(torch.optim.Optimizer):
    """Stands for an optimizer that torch.optim lacks."""

    def __init__(self, params, lr=1e-3, scale=1.0):
        super().__init__(params, dict(lr=lr, scale=scale))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                exp_avg = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                exp_avg.lerp_(param.grad, 0.1)
                param.sub_(group["lr"] * group["scale"] * exp_avg.sign())


def test_optimizer_that_torch_lacks_is_one_row(short_stretches, monkeypatch):
    monkeypatch.setattr(fastopt, "Lion", PlainLion)
    row = tables.Optimizer("Lion", dict(scale=0.5), "Lion")
    monkeypatch.setattr(tables, "OPTIMIZERS", (row,))
    found = benchmark_cases("cpu", "Lion")
    assert [case.name for case in found] == [f"Lion: {model}" for model, *_ in tables.MODELS]
    assert found[0].bytes_moved == 5 * 4 * 44_426  # read p g m, write p m
    entries, _ = runner.times(found[0], Settings(n_rounds=2), [p for p in providers.OPTIMIZERS if not p.compiles])
    assert {name: entry.get("reason") for name, entry in entries.items()} == {
        "torch for-loop": "torch has no Lion",
        "torch foreach": "torch has no foreach Lion",
        "torch fused": "torch has no fused Lion",
        "fastopt": None,
        "copy": None,
    }
    assert entries["fastopt"]["status"] == "timed"


def test_pointwise_loss_is_one_row(monkeypatch):
    monkeypatch.setattr(fastopt.functional, "l1_loss", F.l1_loss, raising=False)
    monkeypatch.setattr(tables, "LOSSES", (tables.Loss("l1_loss"),))
    case, larger = benchmark_cases("cpu", "l1-loss")
    assert case.name == "l1-loss 64 x 10"
    assert case.working == "read input 4 B x 640 + read values 4 B x 640 + write gradient 4 B x 640 = 7,680 B"
    for provider in providers.LOSSES:
        if not provider.compiles:
            ready = work.prepare(case, "cpu")
            assert is_right(ready, ready.start(provider))
            assert not is_right(ready, ready.start(faulty_loss(lambda loss: loss * 1.001)))


def test_quick_leaves_out_what_takes_seconds_on_the_cpu_and_devices_have_their_own():
    quick = {case.name for case in benchmark_cases("cpu", quick=True)}
    assert not any("GPT-2" in name or "128256" in name for name in quick)
    assert not any("bf16" in case.name for case in benchmark_cases("cpu") if case.kind == "optimizer")
    assert any("8192 x 128256 bf16" in case.name for case in benchmark_cases("cuda", quick=True))


# Processes.


def test_raising_and_wrong_providers_are_reported_and_right_ones_timed(short_stretches):
    def fail(case):
        raise RuntimeError("no kernel image\nand more lines")

    def refuse(case):
        raise NotOffered("no such loss")

    table = [
        providers.LOSSES[0],
        Provider("raises", fail),
        Provider("refuses", refuse),
        faulty_loss(lambda loss: 2 * loss),
        Provider("nan", faulty_loss(lambda loss: loss * math.nan).make),
    ]
    entries, n_rounds = runner.times(SMALL_LOSSES[0], Settings(n_rounds=2), table)
    assert n_rounds == 2
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "torch": "timed",
        "raises": "not run",
        "refuses": "not run",
        "faulty": "wrong",
        "nan": "wrong",
        "copy": "timed",
    }
    assert entries["raises"]["reason"] == "RuntimeError: no kernel image"
    assert entries["refuses"]["reason"] == "no such loss"
    assert entries["faulty"]["reason"].startswith("differs by ")
    assert "median_us" not in entries["faulty"]
    json.dumps(entries, allow_nan=False)


def test_provider_that_crashes_is_reported_and_the_others_are_run_again(monkeypatch):
    asked = []

    def one_child(case, settings, names, measured):
        asked.append(names)
        return (None, "b", "its process ended with status -11") if "b" in names else ("outcome", None, None)

    monkeypatch.setattr(runner, "_one_child", one_child)
    outcome, lost = runner._in_child(SMALL_LOSSES[0], Settings(), ["a", "b", "c"], runner.times)
    assert outcome == "outcome"
    assert {name: entry["reason"] for name, entry in lost.items()} == {"b": "its process ended with status -11"}
    assert asked == [["a", "b", "c"], ["a", "c"]]


def test_case_that_takes_too_long_is_reported_for_all_its_providers(monkeypatch):
    monkeypatch.setattr(runner, "_one_child", lambda *job: (None, None, "no result in 1 s"))
    result = runner.run(SMALL_LOSSES[0], Settings())
    assert {entry["status"] for entry in result["providers"]} == {"not run"}
    assert {entry["reason"] for entry in result["providers"]} == {"no result in 1 s"}
    assert result["copy"] is None
    assert report.summarize(result)["ratio"] is None
    assert list(report.lines(result))


def test_compiled_providers_are_timed_in_a_process_of_their_own_beside_fastopt(monkeypatch):
    asked = []

    def one_child(case, settings, names, measured):
        asked.append(names)
        us = 10.0 * len(asked)
        entries = {name: {"provider": name, "status": "timed", "median_us": us} for name in (*names, "copy")}
        return (entries, 5), None, None

    monkeypatch.setattr(runner, "_one_child", one_child)
    result = runner.run(SMALL_LOSSES[0], Settings(compile="loss"))
    assert asked == [["torch", "fastopt"], ["torch compile", "fastopt"]]
    times = {entry["provider"]: entry["median_us"] for entry in result["providers"]}
    assert times == {"torch": 10.0, "torch compile": 20.0, "fastopt": 10.0}
    assert result["providers"][1]["fastopt_beside_us"] == 20.0


@pytest.mark.slow
def test_children_that_take_too_long_are_stopped():
    outcome, _, reason = runner._one_child(SMALL_LOSSES[0], Settings(timeout_s=0.0), ["torch"], runner.times)
    assert (outcome, reason) == (None, "no result in 0 s")
