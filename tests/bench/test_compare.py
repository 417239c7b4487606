"""``benchmarks/compare.py``: cases that count as slower or lost, and the notes beside them."""

import pytest

import compare
from bench_results import reported, result
from fastopt.bench import report


def compared(first, second, tmp_path, *options):
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, run in zip(files, (first, second), strict=True):
        report.write_json(file, run)
    return compare.main([*map(str, files), *options])


def without_torch(name, ours_us, copy_us=5.0):
    """A case in which nothing of torch was timed."""
    found = result(name, ours_us, copy_us)
    for entry in found["providers"]:
        if entry["provider"].startswith("torch"):
            entry.update(status="not run", reason="no memory")
    return found


FIRST = result("work", 2.0)
STEADY = [result(f"steady {index}") for index in range(40)]  # which hold the mean
# The result of the second run, options, the exit status, and the line printed.
ROWS = {
    "the same": (result("work", 2.0), [], 0, "1.00 1.00 1.00"),
    "flagged": (result("work", 2.3), [], 0, "1.15 1.15 1.00  slower"),
    "slower": (result("work", 2.6), [], 1, "1.30 1.30 1.00  SLOWER"),
    "tolerated": (result("work", 3.0), ["--tolerance", "0.6"], 0, "1.50 1.50 1.00  slower"),
    "not tolerated": (result("work", 2.3), ["--tolerance", "0.1"], 1, "1.15 1.15 1.00  SLOWER"),
    "faster": (result("work", 1.0), [], 0, "0.50 0.50 1.00  faster"),
    "slower as the copy was": (result("work", 3.8, copy_us=10.0), [], 1, "1.90 1.90 1.00  SLOWER"),
    "slower as torch was": (result("work", 3.8, torch_us=11.4), [], 0, "1.00 1.90 1.90  torch is slower too"),
    "slower where torch stayed": (result("work", 2.6, torch_us=6.5), [], 1, "1.20 1.30 1.08  SLOWER"),
    "torch is faster": (result("work", 2.0, torch_us=4.0), [], 1, "1.50 1.00 0.67  SLOWER"),
    "wrong now": (result("work", status="wrong", reason="differs"), [], 1, "- - -  lost"),
    "gone": (result("else"), [], 1, "- - -  lost"),
    "torch gone": (without_torch("work", 2.2), [], 0, "1.10 1.10 -  beside the copy: torch was not timed"),
    "torch gone, slower": (
        without_torch("work", 2.6),
        [],
        1,
        "1.30 1.30 -  SLOWER  beside the copy: torch was not timed",
    ),
    "torch gone, slower as the copy was": (
        without_torch("work", 3.8, copy_us=9.5),
        [],
        1,
        "1.00 1.90 -  SLOWER  beside the copy: torch was not timed",
    ),
}


@pytest.mark.parametrize(("second", "options", "status", "line"), ROWS.values(), ids=ROWS)
def test_case_is_compared_with_torch_of_the_same_run(second, options, status, line, tmp_path, capsys):
    assert compared(reported(FIRST, *STEADY), reported(second, *STEADY), tmp_path, *options) == status
    relative, ours, torch, *notes = line.split(maxsplit=3)
    expected = "  ".join([f"work            {relative:>8}  {ours:>7}  {torch:>7}", *notes])
    assert expected in capsys.readouterr().out.splitlines()


def cases(n_cases, **times):
    return reported(*(result(f"case {index}", **times) for index in range(n_cases)))


# Number of cases, their times in the second run, options, exit status.
MEANS = [
    (40, dict(ours_us=2.4), [], 1),
    (40, dict(ours_us=2.4, copy_us=6.0), [], 1),
    (40, dict(ours_us=2.4, torch_us=7.2), [], 0),
    (40, dict(ours_us=2.08), [], 0),
    (40, dict(ours_us=2.12), [], 1),
    (40, dict(ours_us=2.12), ["--mean-tolerance", "0.1"], 0),
    (3, dict(ours_us=2.4), [], 1),
    (3, dict(ours_us=2.12), [], 0),
    (3, dict(ours_us=2.12), ["--mean-tolerance", "0.05"], 1),
    (1, dict(ours_us=2.4), [], 0),
]


@pytest.mark.parametrize(("n_cases", "second", "options", "status"), MEANS)
def test_mean_of_all_cases_has_a_smaller_tolerance(n_cases, second, options, status, tmp_path, capsys):
    assert compared(cases(n_cases), cases(n_cases, **second), tmp_path, *options) == status
    assert ("slower in the mean: 1." in capsys.readouterr().out) == (status == 1)


def test_case_that_was_never_timed_or_is_new_is_no_failure(tmp_path, capsys):
    broken = result("work", status="not run", reason="none")
    other = FIRST | {"name": "other"}
    assert compared(reported(broken, other), reported(FIRST, other), tmp_path) == 0
    assert "never timed" in capsys.readouterr().out
    assert compared(reported(FIRST), reported(FIRST, other), tmp_path) == 0
    assert "only in the second" in capsys.readouterr().out


@pytest.mark.parametrize(("torch_us", "share"), [(9.0, "1.50"), (4.0, "0.67"), (6.5, None)])
def test_changes_of_torchs_own_times_are_reported(torch_us, share, tmp_path, capsys):
    compared(reported(FIRST), reported(result("work", 2.0, torch_us=torch_us)), tmp_path)
    out = capsys.readouterr().out
    assert (f"torch's own times are {share} of the first run's" in out) == (share is not None)
    assert ("torch's own times" in out) == (share is not None)


def test_differences_between_machines_are_reported(tmp_path, capsys):
    second = reported(
        FIRST, threads=4, processor="another processor", gpu={"name": "some GPU", "driver": 1}, torch="2.14.0"
    )
    assert compared(reported(FIRST), second, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "processor: some processor in the first run, another processor in the second",
        "GPU: None in the first run, some GPU in the second",
        "threads: 2 in the first run, 4 in the second",
        "torch: 2.13.0 in the first run, 2.14.0 in the second",
    ]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (reported(FIRST), reported(FIRST, device="cuda"), "both runs must be of one device, got cpu and cuda"),
        (
            reported(result("work", status="wrong", reason="differs")),
            reported(FIRST),
            "the first run must have a case in which fastopt was timed, got none",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_bad_input(first, second, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exited:
        compared(first, second, tmp_path)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_times_alone_are_compared_where_nothing_else_was_timed():
    """A benchmark writes a copy with every time; another program may not."""
    first, second = (reported(without_torch("work", us)) for us in (2.0, 3.0))
    for run in (first, second):
        run["results"][0]["copy"] = None
    (change,) = compare.changes(first, second)
    assert (change.relative, change.note) == (1.5, "by its time alone: neither torch nor the copy was timed")
    lines, is_no_slower = compare.judge([change])
    assert "slower by more than 25% beside torch: work" in lines
    assert not is_no_slower
