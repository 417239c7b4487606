"""``python -m fastopt``: the meaning of each exit status; bad input is reported in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt
from bench_results import result
from fastopt.__main__ import COMMANDS, main
from fastopt._build import architectures, environment, native
from fastopt._build.commands import BadVariable, BuildError
from fastopt.bench import runner
from fastopt.demo import data, glyphs, parity

VARIABLES = ("FASTOPT_BACKEND", "FASTOPT_CUDA", "FASTOPT_WERROR", "FASTOPT_CACHE_DIR", "XDG_CACHE_HOME")
VARIABLES += ("MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "CXX", "FASTOPT_DATA")
DEMO = ["demo", "--model", "lenet", "--steps", "6", "--batch-size", "16", "--quiet", "--optimizer", "sgd"]
BENCH = ["bench", "--quick", "--only", "64 x 10"]
COMMAND_LINES = {"info": ["info"], "info --json": ["info", "--json"], "build": ["build"], "demo": DEMO, "bench": BENCH}


@pytest.fixture(autouse=True)
def no_variables(tmp_path, monkeypatch):
    """None of the variables is set, a file exists, and the data set is small."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setattr(data.glyphs, "draw", lambda n, stream, draw=glyphs.draw: draw(n // 20, stream))


# Bad input.

NO_DIRECTORY = "must name a directory, or a path at which one can be made, got"
BAD_VARIABLES = [
    ("FASTOPT_BACKEND", "cuda", "FASTOPT_BACKEND must be one of auto, native, reference, got 'cuda'"),
    ("FASTOPT_BACKEND", "Native", "FASTOPT_BACKEND must be one of auto, native, reference, got 'Native'"),
    ("FASTOPT_CUDA", "yes", "FASTOPT_CUDA must be 0 or 1, got 'yes'"),
    ("FASTOPT_WERROR", "yes", "FASTOPT_WERROR must be 0 or 1, got 'yes'"),
    ("MAX_JOBS", "many", "MAX_JOBS must be a whole number >= 0, got 'many'"),
    ("MAX_JOBS", "-1", "MAX_JOBS must be a whole number >= 0, got '-1'"),
    ("MAX_JOBS", "²", "MAX_JOBS must be a whole number >= 0, got '²'"),
    ("TORCH_CUDA_ARCH_LIST", "8.0;abacus", "TORCH_CUDA_ARCH_LIST holds 'abacus', which is no compute capability; set"),
    ("TORCH_CUDA_ARCH_LIST", ";", "TORCH_CUDA_ARCH_LIST=';' holds no compute capability; set TORCH_CUDA_ARCH_LIST to"),
    ("CXX", "c++ -pipe", "CXX must name one program, got 'c++ -pipe'; put flags into CFLAGS"),
    ("FASTOPT_CACHE_DIR", "file", f"FASTOPT_CACHE_DIR {NO_DIRECTORY} 'file'"),
    ("FASTOPT_CACHE_DIR", "file/in", f"FASTOPT_CACHE_DIR {NO_DIRECTORY} 'file/in'"),
    ("XDG_CACHE_HOME", "file", f"XDG_CACHE_HOME {NO_DIRECTORY} 'file'"),
]


@pytest.mark.parametrize("command_line", COMMAND_LINES.values(), ids=COMMAND_LINES)
@pytest.mark.parametrize(("name", "value", "message"), BAD_VARIABLES)
def test_bad_variable_is_one_line_that_names_it_with_rule_and_value(
    command_line, name, value, message, monkeypatch, capsys
):
    monkeypatch.setenv(name, value)
    assert main(command_line) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    (line,) = streams.err.splitlines()
    assert line.startswith(f"python -m fastopt {command_line[0]}: error: {message}")


GOOD_VARIABLES = [
    *(("FASTOPT_BACKEND", value) for value in ("", "auto", "native", "reference")),
    *((name, value) for name in ("FASTOPT_CUDA", "FASTOPT_WERROR") for value in ("", "0", "1")),
    *(("MAX_JOBS", value) for value in ("", "0", "1", "64")),
    *(("TORCH_CUDA_ARCH_LIST", value) for value in ("", " ", "native", "9.0", "8.0;9.0a+PTX", "7.0 8.6", "10.0f")),
    *(("TORCH_CUDA_ARCH_LIST", name) for name in architectures.NAMED),
    *(("FASTOPT_CACHE_DIR", value) for value in ("", ".", "absent", "absent/too", "~/absent")),
    ("XDG_CACHE_HOME", "absent"),
    *(("CXX", value) for value in ("", "absent", "/usr/bin/absent")),
]


@pytest.mark.parametrize(("name", "value"), GOOD_VARIABLES)
def test_good_variables_pass(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    environment.check()


def test_cache_in_a_home_that_is_a_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    message = "FASTOPT_CACHE_DIR must name a directory, or a path at which one can be made, got '.*file/.cache/fastopt'"
    with pytest.raises(ValueError, match=message):
        environment.check()


def test_variable_of_the_data_is_named(monkeypatch, capsys):
    monkeypatch.setenv("FASTOPT_DATA", "absent")
    assert main(DEMO) == 2
    assert "error: $FASTOPT_DATA: no IDX files such as" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything can be written here")
@pytest.mark.parametrize("command_line", [[*DEMO, "--json"], [*DEMO, "--png"], [*BENCH, "--json"]])
def test_file_that_cannot_be_written_is_bad_input(command_line, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(SystemExit) as exited:
        main([*command_line, "closed/file"])
    assert exited.value.code == 2


def test_file_that_stops_being_writable_is_bad_input(monkeypatch, tmp_path, capsys):
    """The folder goes while the benchmark runs."""
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(runner, "run", lambda case, settings: (tmp_path / "folder").rmdir() or result(case.name))
    with pytest.raises(SystemExit) as exited:
        main([*BENCH, "--json", "folder/file"])
    assert exited.value.code == 2
    assert "No such file or directory: 'folder/file" in capsys.readouterr().err


# Kernels that are requested and not available.


def without_kernels(monkeypatch, error):
    """A process in which the kernels could neither be found nor built."""

    def compile(*arguments):
        raise error

    monkeypatch.setattr(native.cpu_kernels, "backend", None)
    monkeypatch.setattr(native.cpu_kernels, "find", lambda: None)
    monkeypatch.setattr(native.cpu_kernels, "compile", compile)


@pytest.mark.parametrize("command_line", [["build"], DEMO, BENCH], ids=["build", "demo", "bench"])
@pytest.mark.parametrize(("kind", "status"), [(BuildError, 3), (BadVariable, 2)])
def test_kernels_that_cannot_be_built_are_one_line(command_line, kind, status, monkeypatch, capsys):
    without_kernels(monkeypatch, kind("no compiler is here", "get one"))
    monkeypatch.setenv("FASTOPT_BACKEND", "native")
    assert main(command_line) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m fastopt {command_line[0]}: error: ")
    assert line.endswith("no compiler is here; get one")


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_info_of_requested_kernels_that_cannot_be_loaded_reports_and_fails(arguments, monkeypatch, capsys):
    def broken():
        raise BuildError("the library is broken", "delete it")

    monkeypatch.setattr(native.cpu_kernels, "backend", None)
    monkeypatch.setattr(native.cpu_kernels, "find", broken)
    assert main(["info", *arguments]) == 0
    assert "reference" in capsys.readouterr().out
    monkeypatch.setenv("FASTOPT_BACKEND", "native")
    assert main(["info", *arguments]) == 3
    streams = capsys.readouterr()
    assert "the library is broken" in streams.out
    (line,) = streams.err.splitlines()
    assert line.endswith("FASTOPT_BACKEND=native, but the kernels cannot be used: the library is broken; delete it")


# Crashes.


@pytest.mark.parametrize(
    ("raised", "status"),
    [(RuntimeError("a fault"), 3), (ValueError("a fault"), 3), (MemoryError("a fault"), 3), (KeyboardInterrupt(), 130)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", COMMANDS)
def test_crash_shows_its_traceback_and_is_status_3(name, raised, status, monkeypatch, capsys):
    def crash(args, parser):
        raise raised

    monkeypatch.setitem(COMMANDS, name, (COMMANDS[name][0], crash, "crash"))
    assert main([name]) == status
    err = capsys.readouterr().err
    assert ("Traceback" in err and f"{type(raised).__name__}: a fault" in err) == (status == 3)


def test_command_that_cannot_be_imported_is_status_3(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastopt.bench.cli", None)
    monkeypatch.delattr(fastopt.bench, "cli", raising=False)
    assert main(["info"]) == 3
    assert "ModuleNotFoundError: import of fastopt.bench.cli" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="the shell's pipes are POSIX's")
def test_closed_stdout_shows_no_traceback():
    paths = [str(Path(fastopt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "fastopt", "info"], env=environment, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")


# Results of the commands.


@pytest.mark.parametrize(
    ("ours", "status"),
    [
        ({}, 0),
        (dict(status="wrong", reason="differs"), 1),
        (dict(status="not run", reason="its process ended with status -11"), 3),
    ],
)
def test_benchmark_of_wrong_results_is_status_1_and_of_a_crash_3(ours, status, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda case, settings: result(case.name, **ours))
    assert main(BENCH) == status


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "rmsprop", "adam"])
@pytest.mark.parametrize("lr", ["1e10", "1e30"])
def test_trainings_that_both_diverge_are_bad_input(lr, optimizer, capsys):
    assert main([*DEMO[:-1], optimizer, "--lr", lr]) == 2
    out = capsys.readouterr().out
    assert "Both trainings diverged" in out
    for side in ("torch", "fastopt"):
        assert (
            f"  {optimizer}: {side}'s loss in step 2 is " in out or f"  {optimizer}: {side}'s loss in step 3 is " in out
        )
    assert "BROKEN" not in out
    assert "Parity holds" not in out.replace("Parity holds if", "")


def judge(torch_losses, fastopt_losses, loss_errors=(0.5,), update_errors=(0.5,)):
    shadow = parity.Shadow.__new__(parity.Shadow)
    shadow.loss_errors, shadow.update_errors = list(loss_errors), list(update_errors)
    return parity.judge(shadow, list(torch_losses), list(fastopt_losses), 10.0, 90.0)


NAN, INF = float("nan"), float("inf")
LOST = [2.0, 9.0, NAN, NAN]
VERDICTS = {  # losses of torch and of fastopt, errors on the same logits and gradients; whether both diverged
    "both NaN": (LOST, LOST, [0.5, 0.5, NAN, NAN], [0.5, NAN, NAN, NAN], True),
    "infinite and NaN": ([2.0, 9.0, INF, NAN], LOST, [0.5], [0.5], True),
    "about to be infinite": ([2.0, 9.0, INF], [2.0, 9.0, 1e31], [0.5], [0.5], True),
    "one after the other": ([2.0, NAN, NAN], [2.0, 9.0, NAN], [0.5], [0.5], True),
    "in the first step": ([NAN], [NAN], [NAN], [NAN], True),
    "only fastopt": ([2.0, 9.0, 9.0, 9.0], LOST, [0.5], [0.5], False),
    "only torch": (LOST, [2.0, 9.0, 9.0, 9.0], [0.5], [0.5], False),
    "apart before": (LOST, LOST, [1.5, 0.5, NAN, NAN], [0.5], False),
    "updates apart before": (LOST, LOST, [0.5], [1.5, NAN, NAN, NAN], False),
}


@pytest.mark.parametrize(("torch", "ours", "losses", "updates", "diverged"), VERDICTS.values(), ids=VERDICTS)
def test_trainings_diverged_if_both_losses_grew_and_agreed_until_then(torch, ours, losses, updates, diverged):
    verdict = judge(torch, ours, losses, updates)
    assert (verdict.ok, verdict.diverged) == (False, diverged)
    assert any("'s loss in step" in reason for reason in verdict.reasons)


def test_disagreement_of_one_optimizer_outweighs_divergence_of_another(monkeypatch, capsys):
    def broken(shadow, torch_losses, fastopt_losses, *accuracies, judge=parity.judge):
        shadow.loss_errors[0] = 2.0 if len(seen) == 1 else 0.5
        seen.append(1)
        return judge(shadow, torch_losses, fastopt_losses, *accuracies)

    seen = []
    monkeypatch.setattr(parity, "judge", broken)
    assert main([*DEMO[:-2], "--lr", "1e10"]) == 1
    out = capsys.readouterr().out
    assert "Parity is BROKEN:\n  momentum: on the same logits the losses differ in step 1" in out
    assert "Both trainings diverged" in out


def test_learning_rate_beyond_float32_is_refused(capsys):
    with pytest.raises(SystemExit) as exited:
        main([*DEMO, "--lr", "1e38"])
    assert exited.value.code == 2
    assert "argument --lr: must be <= 1e+30, with which a step stays in float32, got 1e+38" in capsys.readouterr().err


def test_failed_download_of_digits_exits_with_3(monkeypatch, capsys):
    def no_network(*arguments, **options):
        raise data.DownloadError("--download: MNIST could not be fetched")

    monkeypatch.setattr(data, "load", no_network)
    assert main([*DEMO, "--download"]) == 3
    assert "could not be fetched" in capsys.readouterr().err


# Help.


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_states_the_meaning_of_exit_statuses(command, capsys):
    with pytest.raises(SystemExit) as exited:
        main([*command, "--help"])
    assert exited.value.code == 0
    assert "Exit status: 0 success; 1 the answer is no" in " ".join(capsys.readouterr().out.split())
