"""The GPUs that the CUDA library is compiled for, and those that it runs on."""

from types import SimpleNamespace

import pytest

from fastopt._build.architectures import architectures, unsupported_gpus
from fastopt._build.commands import BuildError


def chosen(monkeypatch, listed="", gpus=(), known=(75, 80, 86, 89, 90, 100, 103, 120)):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    return architectures(SimpleNamespace(known_architectures=lambda: list(known)), gpus)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 8.6  9.0", ["sm_80", "sm_86", "sm_90"]),
        (" 9.0; 8.0; 9.0 ", ["sm_80", "sm_90"]),
        ("9.0a", ["sm_90"]),
        ("10.0f+PTX", ["sm_100", "compute_100"]),
        ("7.5+PTX 12.0", ["sm_75", "sm_120", "compute_75"]),
        ("Hopper", ["sm_90", "compute_90"]),
        ("Ampere;Ada", ["sm_80", "sm_86", "sm_89", "compute_86", "compute_89"]),
    ],
)
def test_arch_list_is_read_as_torch_reads_it(monkeypatch, listed, expected):
    assert chosen(monkeypatch, listed) == expected


@pytest.mark.parametrize("word", ["sm_90", "90", "9", "9.0b", "9.0+SASS", "Hoper", "8.0,9.0", "7.0"])
def test_arch_list_that_cannot_be_read_is_named(monkeypatch, word):
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST holds .*8\.0;9\.0\+PTX") as caught:
        chosen(monkeypatch, f"8.0;{word}")
    assert word in str(caught.value)


def test_arch_list_without_an_architecture_is_an_error(monkeypatch):
    with pytest.raises(BuildError, match="holds no compute capability"):
        chosen(monkeypatch, ";")


def test_arch_list_that_leaves_out_a_gpu_is_an_error(monkeypatch):
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST=8.0 leaves out sm_90"):
        chosen(monkeypatch, "8.0", [(9, 0)])


@pytest.mark.parametrize(
    ("gpus", "known", "expected"),
    [
        ((), (75, 80, 86, 89, 90, 100, 103, 120), "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_80"),
        ((), (50, 60, 75, 80, 86, 89, 90), "sm_80 sm_86 sm_89 sm_90 compute_80"),
        ((), (130, 140), "sm_130 compute_130"),
        ([(9, 0)], (80, 90, 100), "sm_90"),
        ([(8, 0), (9, 0)], (80, 90, 100), "sm_80 sm_90"),
        ([(9, 0), (13, 0)], (80, 90, 100), "sm_90 compute_100"),
    ],
    ids=["any GPU", "older nvcc", "newer nvcc", "one", "two", "one newer than nvcc"],
)
def test_architectures_without_a_list(monkeypatch, gpus, known, expected):
    assert chosen(monkeypatch, "", gpus, known) == expected.split()


def test_gpu_older_than_nvcc_is_an_error(monkeypatch):
    with pytest.raises(BuildError, match="sm_61.*sm_75 and newer.*CUDA_VISIBLE_DEVICES"):
        chosen(monkeypatch, "", [(6, 1)])


@pytest.mark.parametrize(
    ("archs", "gpu", "supported"),
    [
        ("sm_90", (9, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80 sm_100", (9, 0), False),
        ("sm_86 compute_80", (9, 0), True),
        ("compute_90", (8, 9), False),
        ("sm_100", (12, 0), False),
    ],
)
def test_machine_code_runs_on_its_major_version_and_ptx_on_all_that_is_newer(archs, gpu, supported):
    assert unsupported_gpus(archs.split(), [gpu]) == ([] if supported else [f"sm_{gpu[0]}{gpu[1]}"])
