"""``python -m fastopt bench --cold``: single calls, each after the caches were overwritten."""

import pytest
import torch

import table
from bench_results import entry, reported
from fastopt.__main__ import main
from fastopt.bench import machine, measure, providers, report, runner, tables
from fastopt.bench.cases import LossCase


class Flush(list):
    """Stands for the array that is larger than the caches."""

    def add_(self, _value):
        self.append("overwritten")


@pytest.fixture
def small_caches(monkeypatch):
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 4096)


def test_cold_clock_overwrites_the_caches_before_each_call_and_does_not_time_it(monkeypatch):
    clock = object.__new__(measure.ColdClock)
    happened = clock._flush = Flush()
    now = iter((10.0, 10.5))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: happened.append("clock") or next(now))
    assert clock.time(lambda: happened.append("call"), 7) == (0.5, None)
    assert happened == ["overwritten", "clock", "call", "clock"]


@pytest.mark.parametrize(("cache_bytes", "n_free", "n_bytes"), [(4096, 2**30, 5120), (None, 2**30, 2**26 * 5 // 4)])
def test_array_that_is_written_is_larger_than_the_last_cache(cache_bytes, n_free, n_bytes, monkeypatch):
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: cache_bytes)
    monkeypatch.setattr(measure, "available_bytes", lambda device: n_free)
    assert measure.ColdClock()._flush.numel() == n_bytes


def test_array_that_is_written_takes_a_quarter_of_the_free_memory_at_most(monkeypatch):
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 4096)
    monkeypatch.setattr(measure, "available_bytes", lambda device: 4000)
    assert measure.ColdClock()._flush.numel() == 1000


@pytest.mark.parametrize(
    ("sizes", "n_bytes"), [(("48K", "2048K", "491520K"), 491520 * 1024), ((), None), (("much",), None)]
)
def test_last_cache_is_the_largest_that_the_system_reports(sizes, n_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CPU", tmp_path)
    for index, size in enumerate(sizes):
        folder = tmp_path / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", index), ("type", "Unified"), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert machine.last_cache_bytes() == n_bytes


@pytest.mark.parametrize("is_cold", [False, True])
def test_cold_calls_are_timed_for_every_provider_and_the_copy_if_asked_for(is_cold, small_caches, monkeypatch):
    monkeypatch.setattr(measure, "STRETCH_S", 1e-4)
    case, offered = LossCase(tables.LOSSES[0], (7, 10)), [p for p in providers.LOSSES if not p.compiles][:2]
    entries, _ = runner.times(case, runner.Settings(n_rounds=3, is_cold=is_cold), offered)
    assert list(entries) == ["torch", "fastopt", "copy"]
    for its in entries.values():
        assert ("cold_median_us" in its) == is_cold
        assert not is_cold or 0 < its["cold_p10_us"] <= its["cold_median_us"] <= its["cold_p90_us"]


def cold_result(name="work"):
    """torch's fastest of cold calls is not that of repeated ones."""
    found = [
        entry("torch for-loop", 8.0, cold_median_us=30.0),
        entry("torch fused", 6.0, cold_median_us=40.0),
        entry("fastopt", 2.0, cold_median_us=20.0),
    ]
    whole = {"name": name, "kind": "loss", "bytes_moved": 8, "working": "2 x 4 B = 8 B", "n_rounds": 3}
    return {**whole, "copy": entry("copy", 5.0, cold_median_us=12.0), "providers": found}


def test_cold_times_are_in_the_summary_the_lines_and_the_table(tmp_path):
    summary = report.summarize(cold_result())
    assert (summary["ratio"], summary["torch_cold_us"], summary["ratio_cold"]) == (3.0, 30.0, 1.5)
    at = report.COLUMNS.index("cold_us") + len("cold_us") + 2
    assert [line[:at].split()[-1] for line in list(report.lines(cold_result()))[1:]] == ["12.0", "30.0", "40.0", "20.0"]
    text = table.markdown(reported(cold_result(), {**cold_result("hot only"), "providers": [entry("fastopt", 2.0)]}))
    assert "| ratio | cold | to compile |" in text
    assert "| **3.00x** | **1.50x** (30.0, 20.0) | - |" in text
    assert "| hot only | - | 2.0 | 2.0-2.0 | - | - | - |" in text
    report.write_json(tmp_path / "run.json", reported(cold_result()))
    assert table.read_json(tmp_path / "run.json")["results"][0]["ratio_cold"] == 1.5


def test_table_of_a_run_without_cold_calls_has_no_such_column():
    run = reported({**cold_result(), "providers": [entry("torch", 6.0), entry("fastopt", 2.0)]})
    assert "| ratio | to compile |" in table.markdown(run)
    for key in ("torch_cold_us", "ratio_cold"):  # as a run of before they were timed
        del run["results"][0][key]
    assert "| ratio | to compile |" in table.markdown(run)


def test_cold_run_from_end_to_end(tmp_path, small_caches, capfd):
    file = tmp_path / "run.json"
    arguments = ["--cold", "--rounds", "3", "--compile", "none", "--threads", "1", "--only", "cross-entropy 64 x 10"]
    before = torch.get_num_threads()
    try:
        assert main(["bench", *arguments, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(before)
    found = table.read_json(file)
    assert found["command"].endswith("--compile none --cold")
    assert found["results"][0]["ratio_cold"] > 0
    assert "cold_us" in capfd.readouterr().out
