"""Steps and losses in some threads, while others replace gradients, states and groups, fork and interrupt.

    PYTHONPATH=tests/helpers:tests/tables python tests/helpers/stress.py SECONDS

What torch alone does not survive is left out: ``p.grad = None`` frees the gradient before it is gone, ``p.data = x``
frees memory that a kernel works in. Prints how often each thing happened. Exits with 1 if a forked child failed or
hung, a thread died, or a step after all that differs from torch's; with a signal if something crashed.
"""

import collections
import os
import random
import signal
import sys
import threading
import time

import torch

import fastopt
from optimizers import OURS, THEIRS, WITH_STATES

SIZES = (300_000, 5, 70_000, 1)  # some whose steps let the interpreter go
MANY_SIZES = (7,) * 150  # gathered by several threads
CLASSES = {name: dict(options, lr=1e-3) for name, options in WITH_STATES.items()}
CHILD_SECONDS = 60

counts = collections.Counter()
stop = threading.Event()


class Interrupted(Exception):
    pass


def attempt(name, action):
    """Runs an action; half-replaced states and the like raise, as in torch."""
    try:
        action()
        counts[name] += 1
    except Interrupted:
        counts["interrupted"] += 1
    except (RuntimeError, KeyError, ValueError, IndexError, TypeError, AttributeError) as failure:
        counts[f"{name}: {type(failure).__name__}"] += 1


class Actions:
    """The actions of threads on one optimizer and its parameters."""

    def __init__(self, name, sizes):
        self.params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
        self.optimizer = getattr(OURS, name)(self.params, **CLASSES[name])
        self.replace_gradient()

    def step(self):
        self.optimizer.step()

    def replace_gradient(self):
        for param in random.sample(self.params, 2):
            param.grad = random.choice([torch.randn_like, torch.zeros_like])(param)

    def replace_state(self):
        param = random.choice(self.params)
        state = self.optimizer.state
        match random.randrange(5):
            case 0:
                state.clear()
            case 1:
                state.pop(param, None)
            case 2:
                for key, value in list(state.get(param, {}).items()):
                    state[param][key] = value.clone() if isinstance(value, torch.Tensor) else value
            case 3:
                state[param][random.choice(list(state[param]))] = torch.zeros(param.shape)  # a step, too
            case 4:
                self.optimizer.load_state_dict(self.optimizer.state_dict())

    def replace_group(self):
        group = self.optimizer.param_groups[0]
        group["lr"] = random.choice([1e-3, torch.tensor(1e-3)])
        group["params"] = random.sample(self.params, random.randint(1, len(self.params)))
        self.optimizer.param_groups = [dict(group)]


class Losses:
    """Logits that others replace."""

    def __init__(self):
        self.replace()

    def loss(self):
        x = self.logits.detach().requires_grad_()
        fastopt.functional.cross_entropy(x, self.target).backward()

    def replace(self):
        self.logits = torch.randn(200, 1000)
        self.target = torch.randint(1000, (200,))


def repeat(name, action):
    while not stop.is_set():
        attempt(name, action)


def fork(optimizers):
    """A child steps each optimizer, whatever its parent's threads were doing."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_SECONDS)  # a hang ends by a signal
        torch.set_num_threads(1)  # torch's own pool does not survive a fork
        for optimizer in optimizers:
            attempt("step of a child", optimizer.step)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        counts["failed children"] += 1
        print("a child ended with status", status, flush=True)


def check(actions):
    """Steps from the values that are left, beside torch's."""
    for made in actions:
        name = type(made.optimizer).__name__
        for param in made.params:
            param.data.nan_to_num_(0, 0, 0)  # a variance may be negative where its states are of different steps
        params = [p.detach().clone().requires_grad_() for p in made.params]
        theirs = getattr(THEIRS, name)(params, **CLASSES[name])
        ours = getattr(OURS, name)(made.params, **CLASSES[name])
        for _ in range(3):
            for a, b in zip(made.params, params, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            ours.step()
            theirs.step()
        for a, b in zip(made.params, params, strict=True):
            torch.testing.assert_close(a, b)


def main(n_seconds):
    actions = [Actions(name, SIZES) for name in CLASSES] + [Actions(name, MANY_SIZES) for name in CLASSES]
    losses = Losses()
    inside = False

    def interrupt(*_):
        if inside:
            raise Interrupted

    signal.signal(signal.SIGUSR1, interrupt)
    work = [("loss", losses.loss), ("replace logits", losses.replace)]
    for made in actions:
        replaces = [made.replace_gradient, made.replace_state, made.replace_group]
        work.append(("step", made.step))
        work.append(("replace", lambda replaces=replaces: random.choice(replaces)()))
    threads = [threading.Thread(target=repeat, args=each, daemon=True) for each in work]
    for thread in threads:
        thread.start()
    end = time.monotonic() + n_seconds
    next_fork = 0
    while time.monotonic() < end:
        if time.monotonic() > next_fork:
            fork([made.optimizer for made in actions])
            counts["forks"] += 1
            next_fork = time.monotonic() + 0.3
        for made in actions:  # the second thread that steps it, and the one that is interrupted
            threading.Timer(random.random() * 0.01, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            try:
                inside = True
                attempt("step", made.step)
                inside = False
            except Interrupted:
                counts["interrupted"] += 1
    all_alive = all(thread.is_alive() for thread in threads)
    stop.set()
    for thread in threads:
        thread.join(CHILD_SECONDS)
        all_alive &= not thread.is_alive()
    print(dict(counts))
    check(actions)
    if not all_alive or counts["failed children"]:
        sys.exit(1)


if __name__ == "__main__":
    main(float(sys.argv[1]))
