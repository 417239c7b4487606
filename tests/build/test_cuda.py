"""Building, caching and finding the CUDA library, with a stand-in package and a fake nvcc."""

import json
import os
import shutil
import textwrap

import pytest

from stand_in import CUDA_COMPILED, CUDA_INFO, DAMAGES, FAKE_NVCC, USE_CUDA, assert_one_warning, do_damage

pytestmark = pytest.mark.slow


def install(package):
    """Move the CUDA library from the cache to where installation leaves it; without nvcc from now on."""
    library = package.cuda_library()
    for path in (library, library.with_name("_cuda.json")):
        shutil.move(path, package.folder)
    (package.root / "bin/nvcc").unlink()


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
    assert with_nvcc.run_cuda() == ("{True}", CUDA_COMPILED)


def test_identity_file_records_sources_nvcc_and_architectures(compiled):
    identity = json.loads(compiled.cuda_library().with_name("_cuda.json").read_text())
    assert identity.keys() == {"cuda_sources", "nvcc", "archs", "sha256"}
    assert (identity["nvcc"], identity["archs"]) == ("13.0.88", ["sm_90"])


def test_other_gpus_need_another_library(compiled):
    assert compiled.run_cuda(gpus=((8, 0),)) == ("{True}", CUDA_COMPILED)
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
    assert compiled.run_cuda(code) == ("True", CUDA_COMPILED if compiles else "")


def test_library_that_cannot_be_opened_leaves_cuda_tensors_to_torch(with_nvcc):
    (with_nvcc.root / "csrc/cuda/library.cu").write_text("int other_function() { return 0; }\n")
    out, err = with_nvcc.run_cuda()
    assert out == "{False}"
    assert_one_warning(err, "not a library of kernels", "driver")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cuda_library_is_compiled_anew(compiled, damage):
    library = compiled.cuda_library()
    do_damage(damage, library, library.with_name("_cuda.json"))
    assert compiled.run_cuda() == ("{True}", CUDA_COMPILED)


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
    out, err = with_nvcc.run_cuda(USE_CUDA + CUDA_INFO, **rocm, **env)
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
    assert (out, err) == ("True", CUDA_COMPILED if compiles else "")
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
    out, err = compiled.run_cuda(USE_CUDA + CUDA_INFO)
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
    assert compiled.run_cuda(gpus=(gpu,)) == ("{True}", CUDA_COMPILED)


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
    out, err = with_nvcc.run_cuda(CUDA_INFO, **arguments)
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
    out, err = compiled.run_cuda("torch.cuda.is_initialized = lambda: True\n" + textwrap.dedent(CUDA_INFO))
    assert (out, err) == ("native-cuda: sm_90, compiled just in time", "")
