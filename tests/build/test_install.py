"""Installing and packaging, with a stand-in package."""

import contextlib
import os
import shutil
import tarfile
import textwrap
import zipfile

import pytest

from stand_in import CUDA_INFO, FAKE_NVCC, ROOT, USE, USE_CUDA

pytestmark = pytest.mark.slow

# The library compiled at installation


def install(package):
    """Move the library from the cache to where installation leaves it."""
    for path in (package.library(), package.entry() / "_C.json"):
        shutil.copy(path, package.folder)
    shutil.rmtree(package.cache)


def test_library_from_installation_serves_without_a_compiler(copied):
    install(copied)
    assert copied.run(CXX="/nonexistent/c++") == ("native-cpu-baseline", "")


@pytest.mark.parametrize("field", ["torch", "python"])
def test_library_from_installation_for_another_torch_or_python_is_not_loaded(copied, field):
    install(copied)
    identity = copied.folder / "_C.json"
    identity.write_text(identity.read_text().replace(f'"{field}": "', f'"{field}": "not-'))
    out, err = copied.run(textwrap.dedent(USE) + 'print(native.info()["reason"])')
    assert out.splitlines() == [
        "native-cpu-baseline",
        f"compiled just in time: the library from installation differs in {field}",
    ]
    assert "compiled in" in err


# Packaging


@pytest.fixture
def project(package):
    """The stand-in package with the real project files around it, ready for the build backend."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, package.root)
    shutil.copytree(ROOT / "_backend", package.root / "_backend")
    (package.root / "README.md").write_text("fastopt\n")
    return package


def call_backend(package, hook, run=None, **env):
    """Run one hook of the build backend; gives the path of what it made and what it said on stderr."""
    code = f"""
        import contextlib, os, sys
        os.chdir({str(package.root)!r})
        sys.path.insert(0, "_backend")
        import fastopt_backend
        with contextlib.redirect_stdout(sys.stderr):
            name = fastopt_backend.{hook}("dist")
        print("made", name)
    """
    out, err = (run or package.run)(code, **env)
    *_, (made, _, name) = [("", "", ""), *(line.partition(" ") for line in out.splitlines())]
    assert made == "made", err
    return package.root / "dist" / name, err


def csrc_files(root):
    return {path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*") if path.is_file()}


def test_wheel_is_compiled_beside_torch(project):
    wheel, _ = call_backend(project, "build_wheel")
    assert "none-any" not in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastopt/_C.json", "fastopt/csrc/torch/module.cpp"} <= names
    assert any(name.startswith("fastopt/_C") and name.endswith(".so") for name in names)


def test_installed_wheel_serves_what_was_compiled(project, tmp_path):
    wheel, _ = call_backend(project, "build_wheel")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert project.run(PYTHONPATH=str(tmp_path / "site"), CXX="/nonexistent/c++") == ("native-cpu-baseline", "")


def test_installed_wheel_compiles_itself_from_the_sources_it_carries(project, tmp_path):
    wheel, _ = call_backend(project, "build_wheel", FASTOPT_AOT="0")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    out, err = project.run(PYTHONPATH=str(tmp_path / "site"))
    assert out == "native-cpu-baseline"
    assert "compiled in" in err


def test_wheel_without_a_compiler_holds_sources_only(project):
    wheel, err = call_backend(project, "build_wheel", CXX="/nonexistent/c++")
    assert wheel.name.endswith("py3-none-any.whl")
    assert "CXX=/nonexistent/c++ cannot be run" in err
    assert "First use compiles it just in time" in err


def test_editable_install_compiles_in_place(project):
    call_backend(project, "build_editable")
    assert project.run(CXX="/nonexistent/c++") == ("native-cpu-baseline", "")


def test_wheel_and_sdist_carry_all_of_csrc(project):
    shutil.rmtree(project.root / "csrc")
    shutil.copytree(ROOT / "csrc", project.root / "csrc")
    wheel, _ = call_backend(project, "build_wheel", FASTOPT_AOT="0")
    sdist, _ = call_backend(project, "build_sdist")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with contextlib.closing(tarfile.open(sdist)) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"fastopt/{name}" for name in csrc_files(ROOT)} <= in_wheel
    assert csrc_files(ROOT) | {"setup.py", "LICENSE", "_backend/fastopt_backend.py"} <= in_sdist


# The CUDA library in a wheel

CUDA_FILES = {"fastopt/_cuda.so", "fastopt/_cuda.json"}


@pytest.fixture
def cuda_project(project):
    project.add_cuda()
    return project


def build_cuda_wheel(project, **env):
    """A wheel built where the only nvcc is the project's own; gives its path, the names in it, what was said."""
    folders = [name for name in os.environ["PATH"].split(os.pathsep) if not os.path.exists(f"{name}/nvcc")]
    wheel, err = call_backend(project, "build_wheel", project.run_cuda, **{"PATH": os.pathsep.join(folders), **env})
    return wheel, set(zipfile.ZipFile(wheel).namelist()), err


def test_wheel_built_with_nvcc_serves_any_gpu(cuda_project, tmp_path):
    nvcc = cuda_project.add_nvcc("usual/bin")
    wheel, names, _ = build_cuda_wheel(cuda_project)
    assert {*CUDA_FILES, "fastopt/_C.json", "fastopt/csrc/cuda/library.cu"} <= names
    assert "code=sm_80 " in cuda_project.nvcc_calls()[0]
    assert "code=compute_80 " in cuda_project.nvcc_calls()[0]
    os.unlink(nvcc)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    site = {"PYTHONPATH": str(tmp_path / "site"), "CXX": "/nonexistent/c++"}
    out, err = cuda_project.run_cuda(USE_CUDA + CUDA_INFO, gpus=((12, 1),), **site)
    assert out.splitlines() == ["{True}", "native-cuda: sm_121, compiled at installation"]
    assert err == ""


def test_wheel_holds_cuda_kernels_only_where_they_are_wanted(cuda_project):
    cuda_project.add_nvcc("usual/bin")
    for torch_cuda, asked, expected in [(None, "1", CUDA_FILES), (None, "", set()), ("13.0", "0", set())]:
        _, names, _ = build_cuda_wheel(cuda_project, torch_cuda=torch_cuda, FASTOPT_CUDA=asked)
        assert names & {*CUDA_FILES, "fastopt/_C.json"} == {*expected, "fastopt/_C.json"}


@pytest.mark.parametrize("reason", ["nvcc not found", "error: nothing works today"])
def test_cuda_kernels_that_cannot_be_compiled_break_the_installation_only_if_forced(cuda_project, tmp_path, reason):
    if reason.startswith("error"):
        cuda_project.add_nvcc("usual/bin", FAKE_NVCC.replace("exec c++ -fPIC", f"echo '{reason}'; exit 1"))
    wheel, names, err = build_cuda_wheel(cuda_project)
    assert names & {*CUDA_FILES, "fastopt/_C.json"} == {"fastopt/_C.json", "fastopt/_cuda.json"}
    assert "installed without CUDA kernels" in err
    assert reason in err
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    cuda_project.add_nvcc()
    out, _ = cuda_project.run_cuda(CUDA_INFO, PYTHONPATH=str(tmp_path / "site"))
    assert "installation could not" in out
    assert reason in out
    (cuda_project.root / "bin/nvcc").unlink()
    with pytest.raises(AssertionError, match=f"(?s)Traceback.*{reason}") as caught:
        build_cuda_wheel(cuda_project, FASTOPT_CUDA="1")
    assert "not compiled ahead of time" not in str(caught.value)


def test_no_requirement_makes_pip_replace_torch(project):
    wheel, _ = call_backend(project, "build_wheel", FASTOPT_AOT="0")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    requires = [
        line for line in archive.read(metadata).decode().splitlines() if line.startswith("Requires-Dist: torch")
    ]
    assert requires == ["Requires-Dist: torch>=2.11"]
