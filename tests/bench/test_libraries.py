"""``benchmarks/libraries.py``: other libraries take their turns where they are installed."""

import json
import subprocess
import sys

import pytest

from paths import ROOT, child_environment

OPTIMI = """
import torch

class SGD(torch.optim.SGD):
    def __init__(self, params, lr, kahan_sum):
        assert kahan_sum is False
        super().__init__(params, lr)
"""


@pytest.mark.slow
def test_installed_library_is_timed_beside_the_others_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "optimi.py").write_text(OPTIMI)
    environment = child_environment()
    environment["PYTHONPATH"] += f":{tmp_path}"
    arguments = ["--quick", "--rounds", "2", "--only", "SGD: LeNet", "--json", str(tmp_path / "run.json")]
    command = [sys.executable, str(ROOT / "benchmarks/libraries.py"), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["command"] == "python benchmarks/libraries.py --quick --only 'SGD: LeNet' --rounds 2"
    assert "deepspeed" in found["not_installed"]
    statuses = {entry["provider"]: entry["status"] for entry in found["results"][0]["providers"]}
    assert statuses["optimi"] == statuses["fastopt"] == "timed"
