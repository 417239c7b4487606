"""Long runs, threads and forks: nothing grows, nothing is torn."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import devices
import fastopt
from common import error, is_native
from optim_cases import make_params, set_grads
from optimizers import NAMES, WITH_STATES
from paths import ROOT, TESTS, child_environment

all_classes = pytest.mark.parametrize("name", NAMES)
N_STEPS = int(os.environ.get("FASTOPT_TEST_STEPS", 20_000 if is_native() else 1_000))


def resident_kib():
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from Linux's /proc")
def test_many_small_steps_with_loss_and_schedule_need_no_more_memory():
    """FASTOPT_TEST_STEPS=1000000 for a million."""
    model = torch.nn.Linear(4, 3)
    optimizer = fastopt.Adam(model.parameters())
    loss_function = fastopt.CrossEntropyLoss()
    x, target = torch.randn(2, 4), torch.tensor([0, 2])

    def train(n_steps):
        for _ in range(n_steps):
            optimizer.zero_grad()
            loss_function(model(x), target).backward()
            optimizer.step()

    train(N_STEPS // 4)
    before = resident_kib()
    train(N_STEPS)
    grown = resident_kib() - before
    print(f"{N_STEPS} steps: {grown} KiB more than {before}")
    assert grown < 1_000  # less than a byte a step for a million


@all_classes
def test_losses_and_steps_in_several_threads_are_independent(name):
    def train():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        model = torch.nn.Linear(300, 100)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        optimizer = getattr(fastopt, name)(model.parameters(), lr=0.01, **WITH_STATES[name])
        x, target = torch.randn(64, 300, generator=generator), torch.randint(100, (64,), generator=generator)
        for _ in range(3):
            optimizer.zero_grad()
            fastopt.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected, results = train(), {}
    workers = [threading.Thread(target=lambda i=i: results.update({i: train()})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for found in results.values():
        for p, q in zip(found, expected, strict=True):
            assert error(p, q) <= 1e-5  # the products' order of summation is torch's


@all_classes
def test_one_optimizer_stepped_by_several_threads_takes_every_step(name):
    """With a gradient that stays, each step of SGD without momentum adds the same; others only count."""
    params = make_params([(20_000,), (7,)], torch.float64)
    start = [p.detach().clone() for p in params]
    options = {"lr": 0.25} if name == "SGD" else WITH_STATES[name]
    optimizer = getattr(fastopt, name)(params, **options)
    set_grads(params, seed=0)
    optimizer.step()
    workers = [threading.Thread(target=lambda: [optimizer.step() for _ in range(5)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if name == "SGD":
        for p, q in zip(params, start, strict=True):
            assert error(p, q - 21 * 0.25 * p.grad) <= 1e-12
    elif (
        is_native() and "step" in optimizer.state[params[0]]
    ):  # torch's own counting is in Python, and not made for this
        assert all(optimizer.state[p]["step"] == 21 for p in params)


@pytest.mark.native
@all_classes
def test_loss_and_steps_work_in_a_fork(name):
    """The child has a copy of a running thread pool, but not its threads; in torch's own operators it would hang."""
    params = make_params([(20_000,), (7,)])
    optimizer = getattr(fastopt, name)(params, **WITH_STATES[name])
    logits, target = torch.randn(300, 70), torch.arange(300) % 70

    def train(first, last):
        for step in range(first, last):
            set_grads(params, seed=step)
            optimizer.step()
        loss = fastopt.functional.cross_entropy(logits, target)
        return [loss.item(), *(p.detach().double().sum().item() for p in params)]

    train(0, 2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, repr(train(2, 4)).encode())
        os._exit(0)
    os.close(write)
    timer = threading.Timer(60, os.kill, (child, signal.SIGKILL))
    timer.start()
    with os.fdopen(read) as pipe:
        result = pipe.read()
    timer.cancel()
    assert os.waitpid(child, 0)[1] == 0
    assert result == repr(train(2, 4))


FORKED = """
    import os, signal, sys, threading, time
    import torch, fastopt

    name, options = sys.argv[1], eval(sys.argv[2])

    def make(n):
        params = [torch.nn.Parameter(torch.ones(n)) for _ in range(2)]
        for p in params:
            p.grad = torch.ones(n)
        return getattr(fastopt, name)(params, **options)

    optimizer, is_over = make(300_000), threading.Event()
    optimizer.step()

    def step():
        while not is_over.is_set():
            optimizer.step()

    workers = [threading.Thread(target=step) for _ in range(2)]
    for worker in workers:
        worker.start()
    n_hanging = 0
    for _ in range(12):
        time.sleep(0.002)
        child = os.fork()
        if child == 0:
            optimizer.step()
            make(5).step()
            os._exit(0)
        end = time.monotonic() + 20
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                n_hanging += 1
                break
            time.sleep(0.002)
        if n_hanging:
            break
    is_over.set()
    for worker in workers:
        worker.join()
    optimizer.step()
    print("hanging:", n_hanging)
"""


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@all_classes
def test_a_child_forked_while_another_thread_steps_can_step(name):
    """A lock that the thread holds is never released in the child, where the thread does not exist."""
    command = [sys.executable, "-c", textwrap.dedent(FORKED), name, repr(WITH_STATES[name])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert result.stdout == "hanging: 0\n", result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.native
def test_steps_and_losses_survive_concurrent_changes():
    """FASTOPT_STRESS_SECONDS=60 for a minute."""
    seconds = os.environ.get("FASTOPT_STRESS_SECONDS", "8")
    program = TESTS / "helpers" / "stress.py"
    command = [sys.executable, str(program), seconds]
    result = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.skipif(devices.CXX is None, reason="the driver needs g++")
def test_the_thread_sanitizer_finds_no_race_in_the_kernels(tmp_path):
    """On std::thread: GCC's OpenMP is not instrumented, and each of its barriers would be reported."""
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-DFASTOPT_ONE_LEVEL", f"-I{ROOT / 'csrc'}"]
    sources = [TESTS / "cpu" / "thread_driver.cpp", *sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))]
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [devices.CXX, *flags, *map(str, sources), "-o", str(tmp_path / "driver")]
    subprocess.run(command, check=True, env=env)
    # Where addresses are spread too widely, the sanitizer does not start.
    fixed_addresses = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    result = subprocess.run([*fixed_addresses, tmp_path / "driver"], capture_output=True, text=True, env=env)
    assert (result.returncode, result.stdout) == (0, "0 results differ from one thread's\n"), result.stderr[-3000:]


CHANGED_TARGETS = """
    import multiprocessing, os, sys
    import torch, fastopt

    n_classes, n_inner = int(sys.argv[1]), int(sys.argv[2])
    sizes = (64, n_classes, n_inner) if n_inner else (2000, n_classes)
    x = torch.randn(sizes, requires_grad=True)
    target = torch.zeros(sizes[:1] + sizes[2:], dtype=torch.long).share_memory_()
    weight, parent = torch.ones(n_classes), os.getpid()

    def change():
        while os.getppid() == parent:
            for value in (2**50, 0, -(2**50), n_classes - 1):
                target.fill_(value)

    process = multiprocessing.get_context("fork").Process(target=change, daemon=True)
    process.start()
    n_raised = 0
    for i in range(400):
        try:
            fastopt.functional.cross_entropy(x, target, weight if i % 2 else None).backward()
        except IndexError:
            n_raised += 1
    process.kill()
    print("lives", n_raised > 0)
"""


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.parametrize(("n_classes", "n_inner"), [(10, 0), (300, 0), (10, 40)])
def test_targets_that_another_process_changes_are_read_once(n_classes, n_inner):
    """The value that is checked must be the one that is used: shared memory may change in between."""
    program = textwrap.dedent(CHANGED_TARGETS)
    command = [sys.executable, "-c", program, str(n_classes), str(n_inner)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.stdout == "lives True\n", result.stderr[-2000:]
