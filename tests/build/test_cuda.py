"""Building, caching and finding the CUDA library, with a stand-in package and a fake nvcc."""

import json
import os
import shutil
import textwrap
from types import SimpleNamespace

import pytest

from fastopt._build.architectures import architectures, unsupported_gpus
from fastopt._build.commands import BuildError
from stand_in import DAMAGES, FAKE_NVCC, USE_CUDA, Containing, assert_one_warning, do_damage

pytestmark = pytest.mark.slow

COMPILED = Containing("compiling the CUDA kernels", "compiled in")
INFO = """
    from fastopt._build import native
    print(native.info()["cuda"])
"""


@pytest.fixture
def cuda(copied):
    """A package whose extension is compiled, with CUDA sources and nothing to compile them."""
    copied.add_cuda()
    return copied


@pytest.fixture
def with_nvcc(cuda):
    cuda.add_nvcc()
    return cuda


@pytest.fixture
def compiled(with_nvcc):
    """A package whose CUDA library has been compiled just in time."""
    assert with_nvcc.run_cuda() == ("{True}", COMPILED)
    return with_nvcc


def install(package):
    """Move the CUDA library from the cache to where installation leaves it; without nvcc from now on."""
    library = package.cuda_library()
    for path in (library, library.with_name("_cuda.json")):
        shutil.move(path, package.folder)
    (package.root / "bin/nvcc").unlink()


# Architectures


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


# nvcc

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
    assert cuda.run_cuda() == ("{True}", COMPILED)


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


def test_library_that_cannot_be_opened_leaves_cuda_tensors_to_torch(with_nvcc):
    (with_nvcc.root / "csrc/cuda/library.cu").write_text("int other_function() { return 0; }\n")
    out, err = with_nvcc.run_cuda()
    assert out == "{False}"
    assert_one_warning(err, "not a library of kernels", "driver")


# First use and the cache


def test_first_cuda_tensor_compiles_for_the_gpus_here_once(compiled):
    *compiles, link = compiled.nvcc_calls()
    assert len(compiles) == 2
    for call in (*compiles, link):
        assert "-gencode arch=compute_90,code=sm_90" in call
        assert call.count("-gencode") == 1
    assert compiled.run_cuda() == ("{True}", "")
    assert len(compiled.nvcc_calls()) == 3


def test_sources_in_several_folders_may_have_one_name(with_nvcc):
    folder = with_nvcc.root / "csrc/cuda"
    (folder / "deep").mkdir()
    (folder / "empty.cu").rename(folder / "deep/library.cu")
    assert with_nvcc.run_cuda() == ("{True}", COMPILED)


def test_identity_file_records_sources_nvcc_and_architectures(compiled):
    identity = json.loads(compiled.cuda_library().with_name("_cuda.json").read_text())
    assert identity.keys() == {"cuda_sources", "nvcc", "archs", "sha256"}
    assert (identity["nvcc"], identity["archs"]) == ("13.0.88", ["sm_90"])


def test_other_gpus_need_another_library(compiled):
    assert compiled.run_cuda(gpus=((8, 0),)) == ("{True}", COMPILED)
    assert compiled.run_cuda() == ("{True}", "")


def test_library_for_any_gpu_serves_one_that_comes_later(with_nvcc):
    out, _ = with_nvcc.run_cuda("from fastopt._build import native; print(native.build_cuda())", gpus=())
    assert out == str(with_nvcc.cuda_library())
    assert "code=sm_120" in with_nvcc.nvcc_calls()[0]
    assert with_nvcc.run_cuda() == ("{True}", "")


@pytest.mark.parametrize(
    ("path", "compiles"),
    [("csrc/cuda/library.cu", True), ("csrc/rules/new.h", True), ("csrc/common.h", True), ("csrc/torch/new.h", False)],
)
def test_changed_cuda_sources_are_compiled_anew(compiled, path, compiles):
    with (compiled.root / path).open("a") as file:
        file.write("// changed\n")
    code = """
        from fastopt._build import native
        native.cpu_kernels.find = lambda: next(native.cache_dir().glob("*/_C.*.so"))  # although that matches no more
        print(native.cuda())
    """
    assert compiled.run_cuda(code) == ("True", COMPILED if compiles else "")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cuda_library_is_compiled_anew(compiled, damage):
    library = compiled.cuda_library()
    do_damage(damage, library, library.with_name("_cuda.json"))
    assert compiled.run_cuda() == ("{True}", COMPILED)


def test_threads_and_processes_compile_once(with_nvcc):
    out, err = with_nvcc.run_cuda(
        """
        import os, threading
        from fastopt._build import native
        native.module()
        child = os.fork()
        served, opened = [], []
        load = native.cuda_kernels.load
        native.cuda_kernels.load = lambda library: opened.append(1) or load(library)
        threads = [threading.Thread(target=lambda: served.append(native.cuda())) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        if child == 0: os._exit(0 if served == [True] * 4 and opened == [1] else 1)
        print(served, opened, os.waitpid(child, 0)[1])
        """
    )
    assert out == "[True, True, True, True] [1] 0"
    assert err.count("compiled in") == 1


# Environment variables


@pytest.mark.parametrize("env", [{"FASTOPT_CUDA": "0"}, {"FASTOPT_BACKEND": "reference"}])
def test_kernels_that_are_not_requested_are_not_compiled(with_nvcc, env):
    assert with_nvcc.run_cuda(**env) == ("{False}", "")
    assert with_nvcc.nvcc_calls() == []


@pytest.mark.parametrize("env", [{}, {"FASTOPT_BACKEND": "native"}, {"FASTOPT_CUDA": "1"}, {"CXX": "/nonexistent/c++"}])
def test_torch_for_rocm_keeps_its_tensors_without_a_warning(with_nvcc, env):
    rocm = {"torch_cuda": None, "torch_hip": "7.0.51831"}
    out, err = with_nvcc.run_cuda(USE_CUDA + INFO, **rocm, **env)
    assert (out.splitlines(), err) == (["{False}", "none: this torch is for ROCm, and the kernels are for CUDA"], "")
    assert with_nvcc.nvcc_calls() == []


def test_native_backend_raises_with_the_reason_for_cuda(cuda):
    _, err = cuda.run_cuda(FASTOPT_BACKEND="native")
    assert "RuntimeError: FASTOPT_BACKEND=native, but the CUDA kernels cannot be used: nvcc not found" in err
    assert "RuntimeWarning" not in err
    assert cuda.run_cuda(FASTOPT_BACKEND="native", FASTOPT_CUDA="0") == ("{False}", "")


def test_unknown_value_is_named(cuda):
    _, err = cuda.run_cuda(FASTOPT_CUDA="yes")
    assert "ValueError: FASTOPT_CUDA must be 0 or 1, got 'yes'" in err


def test_without_the_extension_there_is_one_warning_in_all(with_nvcc):
    out, err = with_nvcc.run_cuda(CXX="/nonexistent/c++")
    assert out == "{False}"
    assert_one_warning(err, "/nonexistent/c++")


@pytest.mark.parametrize(
    ("torch_cuda", "env", "compiles"),
    [("13.0", "", True), (None, "", False), (None, "1", True), ("13.0", "0", False)],
    ids=["torch with CUDA", "torch without", "forced", "forbidden"],
)
def test_build_compiles_the_cuda_library_where_it_is_wanted(with_nvcc, torch_cuda, env, compiles):
    build = "from fastopt._build import native; print(native.build() == native.build())"
    out, err = with_nvcc.run_cuda(build, torch_cuda=torch_cuda, FASTOPT_CUDA=env)
    assert (out, err) == ("True", COMPILED if compiles else "")
    assert bool(list(with_nvcc.cache.glob("*/_cuda.so"))) == compiles


def test_build_without_nvcc_is_an_error_only_if_forced(cuda):
    build = "from fastopt._build import native; native.build(); print('built')"
    assert cuda.run_cuda(build) == ("built", "")
    out, err = cuda.run_cuda(build, FASTOPT_CUDA="1")
    assert out == ""
    assert "RuntimeError: the CUDA kernels cannot be built: nvcc not found; pip install 'nvidia-cuda-nvcc" in err


def test_build_shows_what_nvcc_prints(cuda):
    cuda.add_nvcc("bin", FAKE_NVCC.replace("exec c++ -fPIC", "echo 'a remark of nvcc'; exec c++ -fPIC"))
    _, err = cuda.run_cuda("from fastopt._build import native; native.build(verbose=True)")
    assert err.count("a remark of nvcc") == 2


# The library from installation


def test_cuda_library_from_installation_serves_without_nvcc(compiled):
    install(compiled)
    out, err = compiled.run_cuda(USE_CUDA + INFO)
    assert out.splitlines() == ["{True}", "native-cuda: sm_90, compiled at installation"]
    assert err == ""


@pytest.mark.parametrize("fault", ["other sources", "damaged", "other GPU"])
def test_cuda_library_from_installation_that_does_not_fit_is_not_opened(compiled, fault):
    install(compiled)
    gpu = (9, 0)
    if fault == "other sources":
        (compiled.root / "csrc/cuda/empty.cu").write_text("// changed\n")
    elif fault == "damaged":
        os.truncate(compiled.folder / "_cuda.so", 1000)
    else:
        gpu = (8, 0)
    out, err = compiled.run_cuda(gpus=(gpu,))
    assert out == "{False}"
    assert_one_warning(err, "nvcc not found")
    compiled.add_nvcc()
    assert compiled.run_cuda(gpus=(gpu,)) == ("{True}", COMPILED)


# info


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "not looked at yet: the first CUDA tensor, or python -m fastopt build, finds or compiles them with nvcc"),
        ({"torch_cuda": None}, "none: this torch is built without CUDA"),
        ({"torch_cuda": None, "torch_hip": "7.0.51831"}, "none: this torch is for ROCm"),
        ({"FASTOPT_CUDA": "0"}, "none: FASTOPT_CUDA=0"),
        ({"FASTOPT_BACKEND": "reference"}, "none: FASTOPT_BACKEND=reference"),
        ({"PATH": "/nonexistent", "CXX": shutil.which("c++")}, "none: nvcc not found; pip install 'nvidia-cuda-nvcc"),
    ],
)
def test_info_reports_what_will_run_for_cuda_tensors(with_nvcc, arguments, line):
    out, err = with_nvcc.run_cuda(INFO, **arguments)
    assert out.startswith(line)
    assert err == ""
    assert with_nvcc.nvcc_calls() == []


def test_info_names_the_library_and_its_architectures(compiled):
    keys = ("cuda", "cuda_archs", "cuda_library")
    out, _ = compiled.run_cuda(USE_CUDA + f"    print([native.info()[key] for key in {keys}])")
    assert out.splitlines()[1] == str(
        ["native-cuda: sm_90, compiled just in time", ["sm_90"], str(compiled.cuda_library())]
    )


def test_info_opens_a_library_that_is_there_once_cuda_is_in_use(compiled):
    out, err = compiled.run_cuda("torch.cuda.is_initialized = lambda: True\n" + textwrap.dedent(INFO))
    assert (out, err) == ("native-cuda: sm_90, compiled just in time", "")
