"""The benchmark's clocks, turns, copy, peak memory and statistics."""

from types import SimpleNamespace

import pytest
import torch

from fastopt.bench import measure, work


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
