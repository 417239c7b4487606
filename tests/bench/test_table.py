"""``benchmarks/table.py``: Markdown, pages and pictures of a run, and files that are not of a run."""

import json
import math
import sys

import pytest

import compare
import plot
import table
from bench_results import reported, result
from fastopt.bench import report


def test_markdown_has_a_row_of_each_case_other_libraries_and_what_was_left_out():
    text = table.markdown(reported(result("work"), result("more", host_us=1.5)))
    assert "some processor, 2 threads; torch 2.13.0, Python 3.12.0, fastopt 0.1.0 (native-cpu-x) at abc" in text
    assert "| work | 6.0 (torch fused) | 2.0 | 2.0-2.0 | **3.00x** | 3.0x | 2.50 | - | 2.0, 0.0 |" in text
    assert "| more | 6.0 (torch fused) | 2.0 | 2.0-2.0 | **3.00x** | 3.0x | 2.50 | -, 1.5 | 2.0, 0.0 |" in text
    assert "| work | optimi | 10.0 | 2.0 | **5.00x** |" in text
    assert "| work | apex | wrong: differs by 1, 0.1 allowed | - | - |" in text
    assert "- bitsandbytes not run: bitsandbytes has no such thing (2 cases)" in text
    assert "- Not installed: apex" in text
    broken = table.markdown(reported(result("work", status="wrong", reason="differs")))
    assert "| work | 6.0 (torch fused) | wrong: differs | - | - | 3.0x | - |" in broken


def test_readme_is_rewritten_between_its_markers_and_only_there():
    text = f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n"
    once = table.rewrite_between_markers(text, "new")
    assert once == f"above\n{table.BEGIN}\nnew\n{table.END}\nbelow\n"
    assert table.rewrite_between_markers(once, "new") == once
    others = "<begin>", "<end>"
    assert table.rewrite_between_markers(f"{text}<begin><end>", "new", others) == f"{text}<begin>\nnew\n<end>"
    for wrong in ("", table.BEGIN, f"{table.END}{table.BEGIN}", 2 * f"{table.BEGIN}{table.END}"):
        with pytest.raises(ValueError, match="once each"):
            table.rewrite_between_markers(wrong, "new")


def test_table_of_a_json_goes_to_the_screen_the_readme_and_a_picture(tmp_path, capsys):
    file, readme, picture = (tmp_path / name for name in ("run.json", "README.md", "run.png"))
    report.write_json(file, reported(result("work")))
    assert table.main([str(file)]) == 0
    assert "| work | 6.0 (torch fused)" in capsys.readouterr().out
    readme.write_text(f"{table.BEGIN}{table.END}")
    assert table.main([str(file), "--readme", str(readme)]) == 0
    once = readme.read_text()
    assert table.main([str(file), "--readme", str(readme)]) == 0
    assert readme.read_text() == once
    assert "| work | 6.0" in once
    pytest.importorskip("matplotlib")
    assert table.main([str(file), "--png", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_picture_without_matplotlib_is_one_line_and_no_failure(tmp_path, monkeypatch, capsys):
    report.write_json(tmp_path / "run.json", reported(result("work")))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert table.main([str(tmp_path / "run.json"), "--png", str(tmp_path / "run.png")]) == 0
    assert "no picture, for there is no matplotlib" in capsys.readouterr().err


def test_picture_takes_cases_that_lack_ratios(tmp_path):
    pytest.importorskip("matplotlib")
    plot.save(tmp_path / "run.png", reported(result("work", status="wrong", reason="differs"), result("more")))
    assert (tmp_path / "run.png").stat().st_size > 10_000


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
@pytest.mark.parametrize("command", [table, compare], ids=["table", "compare"])
def test_file_of_another_kind_is_refused(command, content, tmp_path, capsys):
    other, whole = tmp_path / "other.json", tmp_path / "whole.json"
    other.write_text(json.dumps(content))
    report.write_json(whole, WHOLE)
    for files in ([other],) if command is table else ([other, whole], [whole, other]):
        with pytest.raises(SystemExit) as exited:
            command.main(list(map(str, files)))
        assert exited.value.code == 2
        assert f"{other} must hold results of python -m fastopt bench, schema 1" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_file_that_is_no_json_is_refused(content, tmp_path, capsys):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(SystemExit) as exited:
        table.main([str(tmp_path / "other.json")])
    assert exited.value.code == 2
    assert "must hold results of python -m fastopt bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (table, ["--readme", "absent", "a"], "argument --readme: absent: "),
        (compare, ["absent", "absent"], "No such file or directory: 'absent'"),
        (compare, [".", "."], "Is a directory: '.'"),
        (
            compare,
            ["--tolerance", "-0.1", "a", "b"],
            "argument --tolerance: must be >= 0 and finite, got -0.1",
        ),
        (
            compare,
            ["--mean-tolerance", "nan", "a", "b"],
            "argument --mean-tolerance: must be >= 0 and finite, got nan",
        ),
    ],
)
def test_bad_argument_is_named_with_rule_and_value(command, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        command.main(arguments)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err
