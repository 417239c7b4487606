"""Ctrl-C: a step keeps the handler of SIGINT, and leaves every parameter at the same step."""

import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import fastopt
from optimizers import NAMES, WITH_STATES
from paths import ROOT

all_classes = pytest.mark.parametrize("name", NAMES)


INTERRUPTED = """
    import itertools, os, random, signal, sys, threading, time
    import torch, fastopt

    name, n_tensors, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])

    def make():
        params = [torch.nn.Parameter(torch.ones(50, 10)) for _ in range(n_tensors)]
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        return params, getattr(fastopt, name)(params, **options)

    def interrupt(stop, delays):
        while not stop.is_set():
            time.sleep(random.Random(next(delays)).random() * 2e-3)
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    make()[1].step()
    n_interrupted = 0
    delays = itertools.count()
    while n_interrupted < 25:
        params, optimizer = make()
        stop = threading.Event()
        worker = threading.Thread(target=interrupt, args=(stop, delays))
        try:
            worker.start()
            while True:
                optimizer.step()
        except KeyboardInterrupt:
            n_interrupted += 1
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            stop.set(), worker.join()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        assert all(torch.equal(p, params[0]) for p in params), "parameters are at different steps"
        states = [optimizer.state[p] for p in params if p in optimizer.state]
        if states and len(states) == len(params):
            for key in states[0]:
                values = [state.get(key) for state in states]
                assert all(torch.equal(value, values[0]) for value in values), f"{key} is at different steps"
    print("whole after", n_interrupted)
"""


@all_classes
def test_step_keeps_the_handler_of_sigint(name):
    """Others may ask for it, and another thread's step may end first and put back what it found."""
    seen = []

    class Watching(getattr(fastopt, name)):
        def _init_group(self, *args):
            seen.append(signal.getsignal(signal.SIGINT))
            return super()._init_group(*args)

    class Watched(torch.nn.Parameter):
        @property
        def grad(self):
            seen.append(signal.getsignal(signal.SIGINT))
            return torch.ones(2)

    before = signal.getsignal(signal.SIGINT)
    plain = torch.nn.Parameter(torch.ones(2))
    plain.grad = torch.ones(2)
    for cls, param in ((Watching, plain), (getattr(fastopt, name), Watched(torch.ones(2)))):
        optimizer = cls([param], **WITH_STATES[name])
        optimizer.step()
        optimizer.step()
        assert seen
        assert all(handler is before for handler in seen)
        seen.clear()


@pytest.mark.slow
@pytest.mark.native
@all_classes
def test_sigint_in_a_step_leaves_every_parameter_at_the_same_step(name):
    program = textwrap.dedent(INTERRUPTED)
    result = subprocess.run(
        [sys.executable, "-c", program, name, "200", repr(WITH_STATES[name])],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert result.stdout == "whole after 25\n", result.stderr[-2000:]
