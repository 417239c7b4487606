"""``python -m fastopt bench``: reports, comparison, arguments, and a run from end to end."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastopt
from fastopt.__main__ import main
from fastopt.bench import compare, plot, report

# Reports.


def entry(provider, us, **others):
    return {
        "provider": provider,
        "status": "timed",
        "median_us": us,
        "p10_us": us,
        "p90_us": us,
        "gb_per_s": 1.0,
        "of_copy": 5.0 / us,
        **others,
    }


def result(name, ours_us=2.0, copy_us=5.0, **ours):
    found = [
        entry("torch for-loop", 9.0),
        entry("torch fused", 6.0, extra_bytes=2_000_000),
        entry("torch compile", 12.0, fastopt_beside_us=4.0),
        {"provider": "apex", "status": "wrong", "reason": "differs by 1, 0.1 allowed"},
        entry("optimi", 10.0),
        {"provider": "bitsandbytes", "status": "not run", "reason": "bitsandbytes has no such thing"},
        {**entry("fastopt", ours_us), "extra_bytes": 0, **ours},
    ]
    whole = {"name": name, "kind": "loss", "bytes_moved": 8, "working": "2 x 4 B = 8 B", "n_rounds": 3}
    return {**whole, "copy": entry("copy", copy_us), "providers": found}


def told(*results):
    machine = {
        "gpu": None,
        "processor": "abacus",
        "threads": 2,
        "torch": "2.13.0",
        "python": "3.12.0",
        "commit": "abc",
        "fastopt": {"backend": "native-cpu-x", "version": "0.1.0"},
    }
    return report.to_dict(machine, "python -m fastopt bench", {}, ["apex"], list(results))


def test_summary_is_against_the_fastest_torch_and_compile_against_fastopt_beside_it():
    assert report.summarize(result("work")) == {
        "fastest_torch": "torch fused",
        "ratio": 3.0,
        "ratio_to_compile": 3.0,
        "of_copy": 2.5,
    }
    broken = result("work", status="wrong", reason="differs")
    assert report.summarize(broken) == {
        "fastest_torch": "torch fused",
        "ratio": None,
        "ratio_to_compile": 3.0,
        "of_copy": None,
    }


def test_markdown_has_a_row_of_each_case_other_libraries_and_what_was_left_out():
    text = report.markdown(told(result("work"), result("more", host_us=1.5)))
    assert "abacus, 2 threads; torch 2.13.0, Python 3.12.0, fastopt 0.1.0 (native-cpu-x) at abc" in text
    assert "| work | 6.0 (torch fused) | 2.0 | 2.0-2.0 | **3.00x** | 3.0x | 2.50 | -, - | 2.0, 0.0 |" in text
    assert "| more | 6.0 (torch fused) | 2.0 | 2.0-2.0 | **3.00x** | 3.0x | 2.50 | -, 1.5 | 2.0, 0.0 |" in text
    assert "| work | optimi | 10.0 | 2.0 | **5.00x** |" in text
    assert "| work | apex | wrong: differs by 1, 0.1 allowed | - | - |" in text
    assert "- bitsandbytes not run: bitsandbytes has no such thing (2 cases)" in text
    assert "- Not installed: apex" in text
    broken = report.markdown(told(result("work", status="wrong", reason="differs")))
    assert "| work | 6.0 (torch fused) | wrong: differs | - | - | 3.0x | - |" in broken


def test_readme_is_rewritten_between_its_markers_and_only_there():
    text = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    once = report.rewrite_between_markers(text, "new")
    assert once == f"above\n{report.BEGIN}\nnew\n{report.END}\nbelow\n"
    assert report.rewrite_between_markers(once, "new") == once
    for wrong in ("", report.BEGIN, f"{report.END}{report.BEGIN}", 2 * f"{report.BEGIN}{report.END}"):
        with pytest.raises(ValueError, match="once each"):
            report.rewrite_between_markers(wrong, "new")


def test_table_of_a_json_goes_to_the_screen_the_readme_and_a_picture(tmp_path, capsys):
    file, readme, picture = (tmp_path / name for name in ("run.json", "README.md", "run.png"))
    report.write_json(file, told(result("work")))
    assert main(["bench", "table", str(file)]) == 0
    assert "| work | 6.0 (torch fused)" in capsys.readouterr().out
    readme.write_text(f"{report.BEGIN}{report.END}")
    assert main(["bench", "table", str(file), "--readme", str(readme)]) == 0
    once = readme.read_text()
    assert main(["bench", "table", str(file), "--readme", str(readme)]) == 0
    assert readme.read_text() == once
    assert "| work | 6.0" in once
    pytest.importorskip("matplotlib")
    assert main(["bench", "table", str(file), "--png", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_picture_without_matplotlib_is_one_line_and_no_failure(tmp_path, monkeypatch, capsys):
    report.write_json(tmp_path / "run.json", told(result("work")))
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["bench", "table", str(tmp_path / "run.json"), "--png", str(tmp_path / "run.png")]) == 0
    assert "no picture, for there is no matplotlib" in capsys.readouterr().err


def test_picture_takes_cases_that_lack_ratios(tmp_path):
    pytest.importorskip("matplotlib")
    plot.save(tmp_path / "run.png", told(result("work", status="wrong", reason="differs"), result("more")))
    assert (tmp_path / "run.png").stat().st_size > 10_000


# Comparison.


def compared(first, second, tmp_path, *options):
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, results in zip(files, (first, second), strict=True):
        report.write_json(file, told(*results))
    return main(["bench", "compare", *map(str, files), *options])


@pytest.mark.parametrize(
    ("second", "options", "status", "line"),
    [
        (result("work", 2.0), [], 0, "work    1.00"),
        (result("work", 2.3), [], 0, "work    1.15  slower"),
        (result("work", 3.0), [], 1, "work    1.50  SLOWER"),
        (result("work", 3.0), ["--tolerance", "0.6"], 0, "work    1.50  slower"),
        (result("work", 1.0), [], 0, "work    0.50  faster"),
        (result("work", 4.0, copy_us=10.0), [], 0, "work    1.00"),
        (result("work", status="wrong", reason="differs"), [], 1, "work       -  lost"),
        (result("else"), [], 0, "work       -  only in the first"),
    ],
    ids=["same", "flagged", "slower", "tolerated", "faster", "slower machine", "lost", "gone"],
)
def test_comparison_holds_times_against_copies_and_fails_on_what_is_slower(
    second, options, status, line, tmp_path, capsys
):
    assert compared([result("work", 2.0)], [second], tmp_path, *options) == status
    assert line in capsys.readouterr().out.splitlines()


def test_case_that_never_was_timed_is_no_failure():
    broken = told(result("work", status="not run", reason="none"))
    (change,) = compare.changes(broken, told(result("work")))
    assert change.note == "never timed"
    assert not change.is_failure(0.1)


# The command.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such work"], "argument --only: must be part of a case's name (see --list), got 'no such work'"),
        (["--rounds", "0"], "argument --rounds: must be >= 1, got 0"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--json", "absent/file"], "argument --json: must be a file in a directory that exists, got 'absent/file'"),
        (["--readme", "absent"], "argument --readme: absent: "),
        (["compare", "absent", "absent"], "No such file or directory: 'absent'"),
    ],
)
def test_bad_argument_is_named_with_rule_and_value(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        main(["bench", *arguments])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_file_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SystemExit):
        main(["bench", "table", str(tmp_path / "other.json")])
    assert "must hold results of python -m fastopt bench" in capsys.readouterr().err


def test_list_tells_every_case_and_its_bytes(capsys):
    assert main(["bench", "--list", "--device", "cuda", "--only", "50257"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cross-entropy 8192 x 50257 bf16"
    assert lines[1].endswith("= 1,646,886,912 B")


def test_run_from_end_to_end(tmp_path):
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    outputs = ["--json", "run.json", "--readme", "README.md", *(["--png", "run.png"] if has_matplotlib else [])]
    command = [sys.executable, "-m", "fastopt", "bench", "--quick", "--only", "64 x 10", "--threads", "1", *outputs]
    paths = [str(Path(fastopt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "cross-entropy 64 x 10  (read logits 4 B x 640" in ran.stdout

    found = report.read_json(tmp_path / "run.json")
    assert found["command"] == "python -m fastopt bench --quick --only '64 x 10' --threads 1"
    assert found["settings"]["n_threads"] == found["machine"]["threads"] == 1
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["fastopt"]["version"] == fastopt.__version__
    (only,) = found["results"]
    assert only["name"] == "cross-entropy 64 x 10"
    assert only["bytes_moved"] == 5632
    entries = {entry["provider"]: entry for entry in only["providers"]}
    assert entries["torch compile"]["status"] == "not run"
    for timed in (entries["torch"], entries["fastopt"], only["copy"]):
        assert timed["status"] == "timed"
        assert 0 < timed["p10_us"] <= timed["median_us"] <= timed["p90_us"]
        assert timed["gb_per_s"] == pytest.approx(5632 / timed["median_us"] / 1e3)
    assert only["ratio"] == pytest.approx(entries["torch"]["median_us"] / entries["fastopt"]["median_us"])
    assert "| cross-entropy 64 x 10 |" in (tmp_path / "README.md").read_text()
    if has_matplotlib:
        assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
