"""A system without POSIX (no forks, no file locks), such as Windows, runs the reference path."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from optimizers import OPTIMIZERS
from paths import ROOT

# Hides all of Python's library that only POSIX has. torch is imported first, for it checks the system.
HIDE = """
    import os, signal, sys, warnings
    import torch
    for module in ("fcntl", "grp", "posix", "pwd", "resource", "termios"):
        sys.modules[module] = None
    for name in (
        "fork", "forkpty", "register_at_fork", "killpg", "getpgid", "setsid", "geteuid", "getuid", "getloadavg",
        "sched_getaffinity", "sched_setaffinity", "sysconf", "uname", "mkfifo", "statvfs", "wait4", "WIFEXITED",
    ):
        if hasattr(os, name):
            delattr(os, name)
    for name in ("pthread_sigmask", "pthread_kill", "sigwait", "setitimer", "alarm", "pause", "SIGKILL", "SIGHUP"):
        delattr(signal, name)
    warnings.simplefilter("always")
"""

TRAIN = """
    import copy
    import fastopt

    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    for cls in (CLASSES):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        theirs_optimizer = getattr(torch.optim, cls.__name__)(theirs.parameters(), lr=0.01)
        sides = [(ours, cls(ours.parameters(), lr=0.01), fastopt.CrossEntropyLoss(label_smoothing=0.1))]
        sides.append((theirs, theirs_optimizer, torch.nn.CrossEntropyLoss(label_smoothing=0.1)))
        for step in range(3):
            x, target = torch.randn(6, 5), torch.randint(4, (6,))
            for net, optimizer, loss in sides:
                optimizer.zero_grad()
                loss(net(x), target).backward()
                optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q)
    print(fastopt.info()["backend"], fastopt.empty_cache())
""".replace("CLASSES", "".join(f"fastopt.{row.name}, " for row in OPTIMIZERS if row.is_in_torch))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """fastopt and its sources without a library from installation."""
    folder = tmp_path_factory.mktemp("other") / "checkout"
    without = shutil.ignore_patterns("_C*", "_cuda.*", "__pycache__")
    shutil.copytree(ROOT / "fastopt", folder / "fastopt", ignore=without)
    if not (folder / "fastopt/csrc").exists():
        shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def run(checkout, code, **variables):
    """Exit status, output and warnings of a fresh process on a system without POSIX."""
    program = textwrap.dedent(HIDE) + textwrap.dedent(code)
    ours = {"PYTHONPATH": str(checkout), "FASTOPT_CACHE_DIR": str(checkout.parent / "cache")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTOPT_")}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **ours, **variables},
        cwd=checkout.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return ran.returncode, ran.stdout.strip(), ran.stderr


@pytest.mark.slow
def test_the_reference_path_trains_without_posix(checkout):
    assert run(checkout, TRAIN, FASTOPT_BACKEND="reference") == (0, "reference 0", "")


def test_without_posix_the_reference_path_serves_by_itself_after_one_warning(checkout):
    status, out, err = run(checkout, TRAIN)
    assert (status, out) == (0, "reference 0"), err
    assert err.count("RuntimeWarning") == 1
    assert "fastopt runs its slower pure-Python path: no kernels are compiled on" in err
    assert "FASTOPT_BACKEND=reference silences this" in err
    assert not (checkout.parent / "cache").exists()


COMMANDS = [  # arguments, FASTOPT_BACKEND, exit status, text in stdout, text in stderr
    (["info"], "auto", 0, "no kernels are compiled on", ""),
    (["info"], "reference", 0, "FASTOPT_BACKEND=reference", ""),
    (["build"], "auto", 3, "", "error: fastopt cannot be built: no kernels are compiled on"),
    (["demo", "--model", "lenet", "--steps", "2", "--optimizer", "adam"], "auto", 0, "Parity holds.", "RuntimeWarning"),
    (["demo", "--model", "lenet", "--steps", "2"], "native", 3, "", "error: FASTOPT_BACKEND=native, but the kernels"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "backend", "status", "in_stdout", "in_stderr"), COMMANDS)
def test_commands_run_without_posix(arguments, backend, status, in_stdout, in_stderr, checkout):
    found, out, err = run(
        checkout,
        f"""
        from fastopt.__main__ import main
        from fastopt.demo import glyphs
        glyphs.draw = lambda n, stream, draw=glyphs.draw: draw(n // 50, stream)
        sys.exit(main({arguments!r}))
        """,
        FASTOPT_BACKEND=backend,
        HOME=str(checkout),
    )
    assert found == status, err
    assert in_stdout in out
    assert in_stderr in err
    assert "Traceback" not in err


def test_a_machine_is_described_without_posix(checkout):
    code = """
        from fastopt.bench import machine, measure
        from fastopt.demo import report
        print(machine.describe("cpu", 1)["load"], bool(machine.describe("cpu", 1)["system"]), bool(report.processor()))
    """
    assert run(checkout, code, FASTOPT_BACKEND="reference")[:2] == (0, "None True True")


def test_a_cache_on_a_drive_that_is_not_there_is_named(monkeypatch):
    """As Z:\\ may be on Windows, where no folder above it exists either."""
    from fastopt._build import environment

    monkeypatch.setattr(environment.os.path, "lexists", lambda path: False)
    with pytest.raises(ValueError, match="FASTOPT_CACHE_DIR must name a directory"):
        environment.check()


@pytest.mark.slow
def test_torch_without_distributed_imports(checkout):
    code = """
        torch.distributed.is_available = lambda: False
        for name in ("ProcessGroup", "ReduceOp", "is_torchelastic_launched", "get_rank", "all_reduce"):
            delattr(torch.distributed, name)
        import fastopt
        from fastopt.demo import processes
        print(float(fastopt.functional.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))), processes.count())
    """
    assert run(checkout, code, FASTOPT_BACKEND="reference")[:2] == (0, f"{float(torch.tensor(2.0).log())} 1")
