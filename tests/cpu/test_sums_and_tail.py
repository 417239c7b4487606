"""A rule that needs sums over its tensor first, and writes one more array, on both devices."""

import subprocess

import pytest

import devices
from paths import ROOT, TESTS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(devices.CXX is None, reason="the driver needs g++")]


def test_lamb_is_its_formula(tmp_path):
    lamb, csrc = TESTS / "cpu" / "lamb", ROOT / "csrc"
    sources = [lamb / "driver.cpp", csrc / "cpu" / "update.cpp", *sorted((csrc / "cuda").glob("update*.cu"))]
    # Its list of optimizers is found before fastopt's.
    flags = ["-std=c++20", "-O1", "-w", "-pthread", "-DFASTOPT_CUDA_HOST_SHIM", f"-I{lamb}", f"-I{devices.SHIM}"]
    driver = tmp_path / "driver"
    subprocess.run([devices.CXX, *flags, f"-I{csrc}", "-x", "c++", *map(str, sources), "-o", str(driver)], check=True)
    done = subprocess.run([driver], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:]
