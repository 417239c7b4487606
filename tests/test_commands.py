"""``python -m fastopt info`` and ``build``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt
from fastopt.__main__ import main
from paths import child_environment


def test_info_prints_what_fastopt_info_returns(monkeypatch, capsys):
    reported = {"backend": "native-cpu-x", "library": None, "cuda_archs": [], "threads": 2, "archs": ["a", "b"]}
    monkeypatch.setattr(fastopt, "info", lambda: reported)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "backend     native-cpu-x",
        "library     none",
        "cuda_archs  none",
        "threads     2",
        "archs       a, b",
    ]
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == reported


def test_info_runs_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "fastopt", "info", "--json"]
    ran = subprocess.run(command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["threads"] >= 1


def test_build_prints_the_library_or_the_reason_why_not(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(fastopt, "build", lambda verbose: seen.append(verbose) or Path("/somewhere/lib.so"))
    assert main(["build", "--verbose"]) == 0
    assert seen == [True]
    assert capsys.readouterr().out == "/somewhere/lib.so\n"

    def fail(verbose):
        raise RuntimeError("fastopt cannot be built: no compiler")

    monkeypatch.setattr(fastopt, "build", fail)
    assert main(["build"]) == 3
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "fastopt cannot be built: no compiler" in streams.err


def test_no_command_is_an_error_that_names_it(capsys):
    with pytest.raises(SystemExit) as exited:
        main([])
    assert exited.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
