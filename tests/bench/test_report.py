"""``python -m fastopt bench``: reports, arguments, and a run from end to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastopt
import table
from bench_results import result
from fastopt.__main__ import main
from fastopt.bench import report

# Reports.


def test_summary_is_against_the_fastest_torch_and_compile_against_fastopt_beside_it():
    assert report.summarize(result("work")) == {
        "fastest_torch": "torch fused",
        "ratio": 3.0,
        "torch_cold_us": None,
        "ratio_cold": None,
        "ratio_to_compile": 3.0,
        "of_copy": 2.5,
    }
    broken = result("work", status="wrong", reason="differs")
    assert report.summarize(broken) == {
        "fastest_torch": "torch fused",
        "ratio": None,
        "torch_cold_us": None,
        "ratio_cold": None,
        "ratio_to_compile": 3.0,
        "of_copy": None,
    }


# The command.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such work"], "argument --only: must be part of a case's name (see --list), got 'no such work'"),
        (["--rounds", "0"], "argument --rounds: must be >= 1, got 0"),
        (["--cold", "--device", "cuda"], "argument --cold: must be left out with --device cuda"),
        (["--device", "some processor"], "argument --device: invalid choice: 'some processor'"),
        (["--json", "absent/file"], "argument --json: must be a file in a directory that exists, got 'absent/file'"),
        (["sweep"], "unrecognized arguments: sweep"),
    ],
)
def test_bad_argument_is_named_with_rule_and_value(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        main(["bench", *arguments])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_list_prints_every_case_and_its_bytes(capsys):
    assert main(["bench", "--list", "--device", "cuda", "--only", "50257"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cross-entropy 8192 x 50257 bf16"
    assert lines[1].endswith("= 1,646,886,912 B")


@pytest.mark.slow
def test_run_from_end_to_end(tmp_path):
    case = "cross-entropy 64 x 10"
    command = [sys.executable, "-m", "fastopt", "bench", "--quick", "--only", case, "--threads", "1"]
    paths = [str(Path(fastopt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(
        [*command, "--json", "run.json"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "cross-entropy 64 x 10  (read logits 4 B x 640" in ran.stdout

    found = table.read_json(tmp_path / "run.json")
    assert found["command"] == f"python -m fastopt bench --quick --only '{case}' --threads 1"
    assert found["settings"]["n_threads"] == found["machine"]["threads"] == 1
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["fastopt"]["version"] == fastopt.__version__
    (only,) = found["results"]
    assert only["name"] == case
    assert only["bytes_moved"] == 5632
    entries = {entry["provider"]: entry for entry in only["providers"]}
    assert entries["torch compile"]["status"] == "not run"
    for timed in (entries["torch"], entries["fastopt"], only["copy"]):
        assert timed["status"] == "timed"
        assert 0 < timed["p10_us"] <= timed["median_us"] <= timed["p90_us"]
        assert timed["gb_per_s"] == pytest.approx(5632 / timed["median_us"] / 1e3)
    assert only["ratio"] == pytest.approx(entries["torch"]["median_us"] / entries["fastopt"]["median_us"])
