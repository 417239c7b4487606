"""``python -m fastopt bench``: reports, arguments, and a run from end to end."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastopt
from bench_results import reported, result
from fastopt.__main__ import main
from fastopt.bench import plot, report

# Reports.


def test_summary_is_against_the_fastest_torch_and_compile_against_fastopt_beside_it():
    assert report.summarize(result("work")) == {
        "fastest_torch": "torch fused",
        "ratio": 3.0,
        "torch_cold_us": None,
        "ratio_cold": None,
        "ratio_to_compile": 3.0,
        "of_copy": 2.5,
    }
    broken = result("work", status="wrong", reason="differs")
    assert report.summarize(broken) == {
        "fastest_torch": "torch fused",
        "ratio": None,
        "torch_cold_us": None,
        "ratio_cold": None,
        "ratio_to_compile": 3.0,
        "of_copy": None,
    }


def test_markdown_has_a_row_of_each_case_other_libraries_and_what_was_left_out():
    text = report.markdown(reported(result("work"), result("more", host_us=1.5)))
    assert "some processor, 2 threads; torch 2.13.0, Python 3.12.0, fastopt 0.1.0 (native-cpu-x) at abc" in text
    assert "| work | 6.0 (torch fused) | 2.0 | 2.0-2.0 | **3.00x** | 3.0x | 2.50 | - | 2.0, 0.0 |" in text
    assert "| more | 6.0 (torch fused) | 2.0 | 2.0-2.0 | **3.00x** | 3.0x | 2.50 | -, 1.5 | 2.0, 0.0 |" in text
    assert "| work | optimi | 10.0 | 2.0 | **5.00x** |" in text
    assert "| work | apex | wrong: differs by 1, 0.1 allowed | - | - |" in text
    assert "- bitsandbytes not run: bitsandbytes has no such thing (2 cases)" in text
    assert "- Not installed: apex" in text
    broken = report.markdown(reported(result("work", status="wrong", reason="differs")))
    assert "| work | 6.0 (torch fused) | wrong: differs | - | - | 3.0x | - |" in broken


def test_readme_is_rewritten_between_its_markers_and_only_there():
    text = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    once = report.rewrite_between_markers(text, "new")
    assert once == f"above\n{report.BEGIN}\nnew\n{report.END}\nbelow\n"
    assert report.rewrite_between_markers(once, "new") == once
    others = "<begin>", "<end>"
    assert report.rewrite_between_markers(f"{text}<begin><end>", "new", others) == f"{text}<begin>\nnew\n<end>"
    for wrong in ("", report.BEGIN, f"{report.END}{report.BEGIN}", 2 * f"{report.BEGIN}{report.END}"):
        with pytest.raises(ValueError, match="once each"):
            report.rewrite_between_markers(wrong, "new")


def test_table_of_a_json_goes_to_the_screen_the_readme_and_a_picture(tmp_path, capsys):
    file, readme, picture = (tmp_path / name for name in ("run.json", "README.md", "run.png"))
    report.write_json(file, reported(result("work")))
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
    report.write_json(tmp_path / "run.json", reported(result("work")))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "table", str(tmp_path / "run.json"), "--png", str(tmp_path / "run.png")]) == 0
    assert "no picture, for there is no matplotlib" in capsys.readouterr().err


def test_picture_takes_cases_that_lack_ratios(tmp_path):
    pytest.importorskip("matplotlib")
    plot.save(tmp_path / "run.png", reported(result("work", status="wrong", reason="differs"), result("more")))
    assert (tmp_path / "run.png").stat().st_size > 10_000


# The command.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such work"], "argument --only: must be part of a case's name (see --list), got 'no such work'"),
        (["--rounds", "0"], "argument --rounds: must be >= 1, got 0"),
        (["--cold", "--device", "cuda"], "argument --cold: must be left out with --device cuda"),
        (["--device", "some processor"], "argument --device: invalid choice: 'some processor'"),
        (["--json", "absent/file"], "argument --json: must be a file in a directory that exists, got 'absent/file'"),
        (["--readme", "absent"], "argument --readme: absent: "),
        (["compare", "absent", "absent"], "No such file or directory: 'absent'"),
        (["compare", ".", "."], "Is a directory: '.'"),
        (
            ["compare", "--tolerance", "-0.1", "a", "b"],
            "argument --tolerance: must be >= 0 and finite, got -0.1",
        ),
        (
            ["compare", "--mean-tolerance", "nan", "a", "b"],
            "argument --mean-tolerance: must be >= 0 and finite, got nan",
        ),
    ],
)
def test_bad_argument_is_named_with_rule_and_value(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        main(["bench", *arguments])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def timed(**values):
    """A run whose one case has other times of fastopt."""
    run = reported(result("work"))
    run["results"][0]["providers"][-1].update(values)
    return run


WHOLE = reported(result("work"))
OTHER_FILES = {
    "list": [1],
    "empty": {},
    "another schema": {**WHOLE, "schema": 0},
    "no results": {**WHOLE, "results": []},
    "no settings": {key: value for key, value in WHOLE.items() if key != "settings"},
    "no machine": {key: value for key, value in WHOLE.items() if key != "machine"},
    "results of another kind": {**WHOLE, "results": [{"name": "work"}]},
    "no fastopt": {**WHOLE, "results": [{**WHOLE["results"][0], "providers": []}]},
    "a time of 0": timed(median_us=0.0),
    "a time that is no number": timed(median_us=math.nan),
    "a time that is text": timed(median_us="2"),
    "a percentile that is text": timed(p10_us="1"),
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES)
@pytest.mark.parametrize("command", ["table", "compare"])
def test_file_of_another_kind_is_refused(command, content, tmp_path, capsys):
    other, whole = tmp_path / "other.json", tmp_path / "whole.json"
    other.write_text(json.dumps(content))
    report.write_json(whole, WHOLE)
    for files in ([other],) if command == "table" else ([other, whole], [whole, other]):
        with pytest.raises(SystemExit) as exited:
            main(["bench", command, *map(str, files)])
        assert exited.value.code == 2
        assert f"{other} must hold results of python -m fastopt bench, schema 1" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_file_that_is_no_json_is_refused(content, tmp_path, capsys):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(SystemExit) as exited:
        main(["bench", "table", str(tmp_path / "other.json")])
    assert exited.value.code == 2
    assert "must hold results of python -m fastopt bench" in capsys.readouterr().err


def test_list_prints_every_case_and_its_bytes(capsys):
    assert main(["bench", "--list", "--device", "cuda", "--only", "50257"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cross-entropy 8192 x 50257 bf16"
    assert lines[1].endswith("= 1,646,886,912 B")


@pytest.mark.slow
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
