"""The benchmark's tables, the checks before timing, its processes, clocks and statistics."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastopt
from fastopt.bench import measure, providers, report, runner, tables, work, worker
from fastopt.bench.cases import LossCase, OptimizerCase, benchmark_cases
from fastopt.bench.providers import NotOffered, Provider
from fastopt.bench.worker import Settings

SHAPES = ((3, 5), (1,), (129,))
SMALL_STEPS = [OptimizerCase(row, row.label, "small", SHAPES) for row in tables.OPTIMIZERS if row.label]
(CROSS_ENTROPY,) = tables.LOSSES
SMALL_LOSSES = [
    LossCase(CROSS_ENTROPY, (7, 10)),
    LossCase(CROSS_ENTROPY, (7, 10), options=dict(label_smoothing=0.1)),
    LossCase(CROSS_ENTROPY, (7, 10), trait="probabilities"),
    LossCase(CROSS_ENTROPY, (7, 10), torch.bfloat16),
    LossCase(CROSS_ENTROPY, (7, 10), trait="no gradient"),
    LossCase(CROSS_ENTROPY, (2, 5, 3, 4)),
    LossCase(CROSS_ENTROPY, (2, 5, 3, 4), trait="channels_last"),
]
EVERY = {case.name: case for device in ("cpu", "cuda") for case in benchmark_cases(device)}


def named(values):
    return pytest.mark.parametrize("case", values, ids=[value.name for value in values])


@pytest.fixture
def short_stretches(monkeypatch):
    monkeypatch.setattr(measure, "STRETCH_S", 1e-4)


def is_right(ready, started):
    error, allowed = ready.check(started)
    return error <= allowed


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


@pytest.mark.parametrize("plain_torch", [PlainLion, None])
def test_optimizer_that_torch_lacks_is_one_row(plain_torch, short_stretches, monkeypatch):
    monkeypatch.setattr(fastopt, "Lion", PlainLion, raising=False)
    row = tables.Optimizer("Lion", dict(scale=0.5), "Lion", plain_torch=plain_torch)
    monkeypatch.setattr(tables, "OPTIMIZERS", (row,))
    found = benchmark_cases("cpu", "Lion")
    assert [case.name for case in found] == [f"Lion: {model}" for model, *_ in tables.MODELS]
    assert found[0].bytes_moved == 5 * 4 * 44_426  # read p g m, write p m
    table = [provider for provider in providers.OPTIMIZERS if provider.package in ("torch", "fastopt")]
    entries, _ = worker.times(found[0], Settings(n_rounds=2), [p for p in table if not p.compiles])
    assert {name: entry.get("reason") for name, entry in entries.items()} == {
        "torch for-loop": None if plain_torch else "torch has no Lion",
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
        if provider.package in ("torch", "fastopt") and not provider.compiles:
            ready = work.prepare(case, "cpu")
            assert is_right(ready, ready.start(provider))
            assert not is_right(ready, ready.start(faulty_loss(lambda loss: loss * 1.001)))


def test_quick_leaves_out_what_takes_seconds_on_the_cpu_and_devices_have_their_own():
    quick = {case.name for case in benchmark_cases("cpu", quick=True)}
    assert not any("GPT-2" in name or "128256" in name for name in quick)
    assert not any("bf16" in case.name for case in benchmark_cases("cpu") if case.kind == "optimizer")
    assert any("8192 x 128256 bf16" in case.name for case in benchmark_cases("cuda", quick=True))


# Checks before timing.


@named(SMALL_STEPS)
def test_right_optimizers_pass_the_check(case):
    for provider in providers.OPTIMIZERS:
        if provider.package in ("torch", "fastopt") and not provider.compiles:
            ready = work.prepare(case, "cpu")
            try:
                started = ready.start(provider)
            except NotOffered:
                assert provider.package == "torch"
                assert provider.name == "torch fused" or not hasattr(torch.optim, case.optimizer.name)
                continue
            assert is_right(ready, started), provider.name


@named(SMALL_LOSSES)
def test_right_losses_pass_the_check(case):
    for provider in providers.LOSSES:
        if provider.package in ("torch", "fastopt") and not provider.compiles:
            ready = work.prepare(case, "cpu")
            assert is_right(ready, ready.start(provider)), provider.name


def faulty_loss(change):
    def loss(logits, target, **options):
        return change(F.cross_entropy(logits, target, **options))

    return Provider("faulty", lambda case: loss)


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
    entries, n_rounds = worker.times(SMALL_LOSSES[0], Settings(n_rounds=2), table)
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
    outcome, lost = runner._in_child(SMALL_LOSSES[0], Settings(), ["a", "b", "c"], worker.times)
    assert (outcome, lost) == ("outcome", {"b": "its process ended with status -11"})
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


def test_children_that_take_too_long_are_stopped():
    outcome, _, reason = runner._one_child(SMALL_LOSSES[0], Settings(timeout_s=0.0), ["torch"], worker.times)
    assert (outcome, reason) == (None, "no result in 0 s")


# Clocks and statistics.


def test_spread_interpolates_percentiles():
    assert measure.spread([7.0]) == {"median": 7.0, "p10": 7.0, "p90": 7.0}
    assert measure.spread([3.0, 1.0, 2.0]) == pytest.approx({"median": 2.0, "p10": 1.2, "p90": 2.8})
    assert measure.spread(list(range(11))) == {"median": 5, "p10": 1, "p90": 9}


def test_providers_take_turns_and_every_other_round_is_reversed():
    turns = []
    clock = SimpleNamespace(n_calls=lambda call: 3, time=lambda call, n: (call() or turns.append(n) or 0.5, None))
    calls = {name: (lambda name=name: turns.append(name)) for name in "ab"}
    times = measure.interleaved(calls, clock, n_rounds=2)
    assert turns == ["a", 3, "b", 3, "b", 3, "a", 3]
    assert times == {"a": [(0.5, None)] * 2, "b": [(0.5, None)] * 2}


@pytest.mark.parametrize(("seconds", "n_rounds"), [(10.0, 3), (0.15, 14), (1e-6, 41)])
def test_rounds_are_as_many_as_the_budget_allows(seconds, n_rounds, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def time(call, n):
        now[0] += seconds
        return seconds, None

    clock = SimpleNamespace(n_calls=lambda call: 1, time=time)
    assert len(measure.interleaved({"a": print, "b": print}, clock, budget_s=4.0)["a"]) == n_rounds


def test_cpu_clock_repeats_a_short_call_for_its_stretch_and_a_long_one_once():
    clock = measure.CpuClock()
    assert 100 < clock.n_calls(lambda: None) <= measure.MAX_CALLS
    clock.time = lambda call, n_calls: (0.2, None)
    assert clock.n_calls(None) == 1
    clock.time = lambda call, n_calls: (0.001, None)
    assert clock.n_calls(None) == 30


def test_cuda_clock_flushes_before_each_call_and_waits_after_it(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait for all"))
    clock = object.__new__(measure.CudaClock)
    clock._flush = SimpleNamespace(zero_=lambda: happened.append("flush"))
    device_s, host_s = clock.time(lambda: happened.append("call"), 2)
    assert happened == ["call", "wait for all", *["flush", "record", "call", "record", "wait"] * 2]
    assert device_s == pytest.approx(2e-3)
    assert 0 <= host_s < 1e-3
    assert clock.n_calls(lambda: None) == 15


def test_copy_moves_the_bytes_asked_for_and_scales_the_time_of_more(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", 1000)
    assert (measure.Copy(600, "cpu").bytes_copied, measure.Copy(600, "cpu").scale) == (600, 1.0)
    large = measure.Copy(4000, "cpu")
    assert (large.bytes_copied, large.scale) == (1000, 4.0)
    large()


def test_peak_memory_is_the_most_held_at_once():
    n_bytes = 2**26

    def call():
        for _ in range(3):
            torch.zeros(n_bytes, dtype=torch.uint8).add_(1)

    extra_bytes = measure.peak_extra_bytes(work.Started(call, list), "cpu")
    if extra_bytes is None:
        pytest.skip("this system keeps no high-water mark that can be reset")
    assert extra_bytes == pytest.approx(n_bytes, rel=0.1)
