"""Finding nvcc, and what is reported where there is none or it fails, with a stand-in package and a fake nvcc."""

import os
import textwrap

import pytest

from stand_in import CUDA_COMPILED, FAKE_NVCC, assert_one_warning

pytestmark = pytest.mark.slow

WHICH = """
    from fastopt._build.nvcc import find_nvcc
    nvcc = find_nvcc()
    print(nvcc.command, *nvcc.include_dirs, *nvcc.library_dirs)
"""


def test_nvcc_is_looked_for_in_every_place_in_turn(cuda):
    places = ["home/bin", "path/bin", "bin", "usual/bin", "of_pip/cu13/bin"]
    env = {"CUDA_HOME": str(cuda.root / "home"), "CUDA_PATH": str(cuda.root / "path")}
    nvccs = [cuda.add_nvcc(place) for place in places]
    for nvcc in nvccs:
        out, err = cuda.run_cuda(WHICH, **env)
        assert (out.split()[0], err) == (nvcc, "")
        os.unlink(nvcc)
    assert "NoNvcc: nvcc not found" in cuda.run_cuda(WHICH, **env)[1]


def test_nvcc_from_pip_gets_the_parts_in_other_entries_of_the_path(cuda, tmp_path):
    nvcc = cuda.add_nvcc("of_pip/cu13/bin")
    (cuda.root / "of_pip/cu13/include").mkdir()
    below = tmp_path / "below"
    for part in ("cu13/include/cccl", "cu13/lib", "cu12/include"):
        (below / "of_pip" / part).mkdir(parents=True)
    out, _ = cuda.run_cuda(f"import sys; sys.path.append({str(below)!r})\n" + textwrap.dedent(WHICH))
    ours, theirs = cuda.root / "of_pip/cu13", below / "of_pip/cu13"
    assert out.split() == [nvcc, f"{ours}/include", f"{theirs}/include", f"{theirs}/include/cccl", f"{theirs}/lib"]


@pytest.mark.parametrize("body", ["exit 1", "exit 0"])
def test_broken_nvcc_is_passed_over_or_named(cuda, body):
    broken = cuda.add_nvcc("bin", body)
    out, err = cuda.run_cuda()
    assert out == "{False}"
    assert_one_warning(err, f"{broken} is broken")
    cuda.add_nvcc("usual/bin")
    assert cuda.run_cuda() == ("{True}", CUDA_COMPILED)


@pytest.mark.parametrize(("version", "supported"), [("11.8.89", False), ("12.0.140", False), ("12.1.66", True)])
def test_nvcc_that_is_too_old_is_passed_over_or_named(cuda, version, supported):
    old = cuda.add_nvcc("bin", FAKE_NVCC.replace("V13.0.88", f"V{version}"))
    out, err = cuda.run_cuda()
    assert out == f"{{{supported}}}"
    if not supported:
        assert_one_warning(err, f"nvcc {version} ({old}) is too old: the kernels need 12.1 or later", "pip install")
        newer = cuda.add_nvcc("usual/bin")
        assert cuda.run_cuda(WHICH)[0].split()[0] == newer


def test_no_nvcc_leaves_cuda_tensors_to_torch_after_one_warning(cuda):
    out, err = cuda.run_cuda()
    assert out == "{False}"
    assert_one_warning(
        err, "torch's own serve them", "nvcc not found", "pip install 'nvidia-cuda-nvcc==13.0.*'", "FASTOPT_CUDA=0"
    )


def test_toolkit_is_advised_where_pip_has_no_nvcc(cuda):
    _, err = cuda.run_cuda(torch_cuda="12.8")
    assert_one_warning(err, "install the CUDA toolkit 12.8 and set CUDA_HOME")
    assert "pip install" not in err


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("kernels.cu(7): error: expected a ';'", ["expected a ';'", "--verbose"]),
        ("#error -- unsupported GNU version! gcc versions later than 15", ["unsupported GNU version", "NVCC_CCBIN"]),
        ("ptxas fatal   : Ptx assembly aborted", ["Ptx assembly aborted"]),
        ("sh: 1: cicc: not found", ["cicc: not found", "nvidia-nvvm"]),
        ("nvcc fatal   : Failed to preprocess host compiler properties.", ["apt-get install g++"]),
        ("error writing: No space left on device", ["FASTOPT_CACHE_DIR"]),
    ],
)
def test_failure_of_nvcc_is_quoted_in_the_warning(cuda, printed, words):
    cuda.add_nvcc("bin", FAKE_NVCC.replace("exec c++ -fPIC", f'echo "{printed}" >&2; exit 2; exec c++'))
    out, err = cuda.run_cuda()
    assert out == "{False}"
    assert_one_warning(err, "nvcc 13.0.88", *words)
    assert not list(cuda.cache.glob("*/_cuda*"))
