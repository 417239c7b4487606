"""Training by several processes on torch's own engine: modes, checkpoints, and the loss of logits sharded by class.

torchrun is launched once with 2 and once with 4 processes; each runs all checks of the tables in ``distributed_*.py``.
"""

import json
import subprocess
import sys

import pytest
import torch

import distributed_worker
from common import is_native
from distributed_modes import N_STEPS
from fastopt.__main__ import main
from fastopt.demo import data, processes, train
from paths import child_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]

LAUNCH_TIMEOUT_S = 300
# Of float64 parameters of about 1: roundings of 20 steps, where Adam and RMSprop divide by small square roots.
TOLERANCE = 1e-12
CHECKS = [(n, name) for n in (2, 4) for name in distributed_worker.names(n)]


def torchrun(n_processes, *arguments, folder):
    """Standard output of processes that torchrun launches; those that hang are ended with it."""
    environment = child_environment(OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    process = subprocess.Popen(
        [*command, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=LAUNCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        out, err = process.communicate(timeout=60)
        pytest.fail(f"no end after {LAUNCH_TIMEOUT_S} s: {err[-3000:]}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each check, by number of processes and name: what each process returned. The 4 load what the 2 have saved."""
    folder = tmp_path_factory.mktemp("distributed")
    found = {}
    for n_processes in (2, 4):
        code, _, err = torchrun(n_processes, distributed_worker.__file__, str(folder), folder=folder)
        file = folder / f"results-{n_processes}.json"
        assert file.exists(), f"exit status {code}: {err[-3000:]}"
        assert code == 0, err[-3000:]
        found |= {(n_processes, name): result for name, result in json.loads(file.read_text()).items()}
    return found


@pytest.mark.parametrize(("n_processes", "name"), CHECKS)
def test_several_processes_give_the_result_of_one(n_processes, name, results):
    for rank, result in enumerate(results[n_processes, name]):
        assert "error" not in result, f"process {rank}: {result['error']}"
        if name.endswith("/float64"):
            assert result["fastopt"] <= TOLERANCE
        elif name.endswith("/float32"):
            assert result["fastopt"] <= 2 * result["torch"] + 1e-7
        if "n_calls" in result:
            assert result["n_calls"] == (N_STEPS if is_native() else 0), "the kernels did not take every step"
        assert result.get("difference", 0.0) <= TOLERANCE


def test_demo_of_two_processes_gives_the_result_of_one(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTOPT_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train.Config("lenet", steps=6, batch_size=32)
    options = ["--model", "lenet", "--steps", "6", "--batch-size", "32", "--optimizer", "adam", "--quiet"]
    code, out, err = torchrun(2, "-m", "fastopt", "demo", *options, "--json", "out.json", folder=tmp_path)
    assert code == 0, out + err
    assert out.count("Parity holds.") == 1, "one process speaks for all"
    assert "batch 32 shared by 2 processes" in out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["processes"] == 2
    one = train.compare("adam", config, data.draw())
    for side in ("torch", "fastopt"):
        found, expected = report["results"][0][side], getattr(one, side)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["accuracy_percent"] == pytest.approx(expected["accuracy_percent"], abs=0.2)


def test_batch_not_divisible_by_the_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(data, "load", lambda *_, **__: data.draw(100, 10))
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--batch-size", "33"])
    assert "must be a multiple of the 2 processes, got 33" in capsys.readouterr().err
