"""Compiled losses: the kernels from a process's first use on, the gradient without a copy, and torch's caches."""

import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F

import fastopt
from common import assert_no_worse, kernel_calls
from fastopt._build import native
from loss_cases import make_values

pytestmark = pytest.mark.native

cross_entropy = fastopt.functional.cross_entropy

FIRST_USE = """
    import torch, fastopt
    from fastopt._build import native

    theirs = torch.nn.functional.cross_entropy
    x = torch.randn(64, 1000, requires_grad=True)
    target = torch.randint(0, 1000, (64,))
    if {was_replaced}:
        torch.nn.functional.cross_entropy = fastopt.functional.cross_entropy
        torch.compile(torch.sin)(x)
        torch.nn.functional.cross_entropy = theirs
    compiled = torch.compile(lambda x, target: fastopt.functional.cross_entropy(x, target), fullgraph=True)
    compiled(x, target).backward()
    calls = native.module().kernel_calls()["cross_entropy"] if native.module() else 0
    expected = torch.autograd.grad(theirs(x, target), x)[0]
    torch.testing.assert_close(x.grad, expected)
    print("kernel calls", calls)
"""


def first_use(cache, backend, was_replaced):
    env = {**os.environ, "FASTOPT_BACKEND": backend, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", textwrap.dedent(FIRST_USE).format(was_replaced=was_replaced)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("FASTOPT_SANITIZE")), reason="compiles in more processes")
@pytest.mark.parametrize(
    ("was_replaced", "backends"),
    [(False, ("reference", "native", "native", "reference")), (True, ("native", "reference"))],
)
def test_the_first_use_in_a_process_takes_the_kernels(was_replaced, backends, tmp_path):
    """A cached program that was compiled without kernels is not used with them, nor the other way round. And if the
    loss was in the place of torch's: Dynamo lists torch's functions at its first compilation, and
    looks into none of them ever after.
    """
    for backend in backends:
        assert first_use(tmp_path, backend, was_replaced) == f"kernel calls {1 if backend == 'native' else 0}"


def logits_and_target():
    return make_values((64, 1000)).requires_grad_(), torch.randint(0, 1000, (64,))


@pytest.fixture(scope="module")
def compiled():
    return torch.compile(lambda x, target: cross_entropy(x, target), fullgraph=True)


def test_a_step_calls_the_kernel_once(compiled):
    x, target = logits_and_target()
    for factor in (1.0, 0.25, 0.25):
        (compiled(x, target) * factor).backward()
    before = kernel_calls("cross_entropy")
    (compiled(x, target) * 0.25).backward()
    assert kernel_calls("cross_entropy") == before + 1


def test_factors_and_retained_graphs_give_torchs_gradients():
    # Otherwise torch refuses to retain the graph of any program that saves what it has computed.
    with torch._functorch.config.patch(donated_buffer=False):
        check_factors(torch.compile(lambda x, target: cross_entropy(x, target) * 1.0, fullgraph=True))


def check_factors(compiled):
    x, target = logits_and_target()
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(wide, target), wide)
    for factors in ((1.0,), (0.5,), (3.0, 3.0, 1.0), (1 / 3, 0.0)):
        loss = compiled(x, target)
        for factor in factors:
            (found,) = torch.autograd.grad(loss * factor, x, retain_graph=True)
            (reference,) = torch.autograd.grad(F.cross_entropy(x, target) * factor, x)
            assert_no_worse(found, reference, truth * factor)


def test_logits_that_a_backward_computes_anew_take_any_factor():
    """A program keeps what its logits came from, and computes them twice."""

    def loss_of(x, target):
        return cross_entropy(torch.sin(x) * 3 + x.exp(), target)

    compiled = torch.compile(loss_of, fullgraph=True)
    x, target = logits_and_target()
    for factor in (1.0, 0.5, 0.3, 7.0):
        (found,) = torch.autograd.grad(compiled(x, target) * factor, x)
        (reference,) = torch.autograd.grad(loss_of(x, target) * factor, x)
        torch.testing.assert_close(found, reference)


def test_two_losses_of_the_same_logits_have_gradients_of_their_own():
    compiled = torch.compile(lambda x, target: cross_entropy(x, target) + 2 * cross_entropy(x, target), fullgraph=True)
    x, target = logits_and_target()
    (found,) = torch.autograd.grad(compiled(x, target), x)
    (reference,) = torch.autograd.grad(3 * F.cross_entropy(x, target), x)
    torch.testing.assert_close(found, reference)


def test_gradient_without_a_consumer_is_freed(compiled):
    """With the program's own tensors, not at the end of the process."""
    x, target = torch.randn(512, 8000, requires_grad=True), torch.randint(0, 8000, (512,))

    def resident():
        gc.collect()
        native.empty_cache()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    compiled(x, target)
    before = resident()
    for _ in range(20):
        compiled(x, target)
    assert resident() - before < 4 * x.nbytes
