"""Division of tasks among threads (csrc/cpu/parallel.h), compiled alone."""

import subprocess

import pytest

import devices
from paths import ROOT, TESTS

pytestmark = pytest.mark.skipif(devices.CXX is None, reason="the driver needs g++")


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    driver = tmp_path_factory.mktemp("parallel") / "driver"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([devices.CXX, *flags, str(TESTS / "cpu" / "parallel_driver.cpp"), "-o", str(driver)], check=True)
    done = subprocess.run([driver], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:]
    rows = [line.split(":") for line in done.stdout.splitlines()]
    return {tuple(map(int, case.split())): list(map(int, tasks.split())) for case, tasks in rows}


def test_each_task_runs_once(taken):
    assert len(taken) == 71 * sum(range(1, 8))


def test_share_of_a_thread_equals_torchs_parallel_for(taken):
    for (n_threads, n_tasks, thread), tasks in taken.items():
        n_threads = min(n_threads, n_tasks)
        if n_tasks == 0 or thread >= n_threads:
            continue
        n = -(-n_tasks // n_threads)
        share = list(range(thread * n, min((thread + 1) * n, n_tasks)))
        assert tasks[: len(share)] == share, (n_threads, n_tasks, thread)


def test_the_last_tasks_of_a_share_are_left_to_its_thread(taken):
    for (n_threads, n_tasks, thread), tasks in taken.items():
        n = -(-n_tasks // min(n_threads, n_tasks)) if n_tasks else 1
        for other in range(n_threads):
            share = set(range(other * n, min((other + 1) * n, n_tasks)))
            if share and other != thread < min(n_threads, n_tasks):
                left = sorted(share.difference(tasks))
                assert 1 <= len(left) <= max(n // 16, 1), (n_threads, n_tasks, thread)
                assert left[-1] == max(share), (n_threads, n_tasks, thread)
