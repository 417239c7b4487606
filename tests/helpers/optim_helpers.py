"""Shared by the tests of optimizers against torch's: steps, what is compared, and programs for two classes."""

import contextlib
import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from optimizers import IN_TORCH, OURS, THEIRS


def step_through(optimizer, params, n_steps, first=0):
    """Steps with gradients that depend on the step alone, the same for any dtype but for rounding."""
    for step in range(first, first + n_steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            wide = torch.complex128 if p.is_complex() else torch.float64
            p.grad = torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype)
        optimizer.step()


def assert_same(found, expected, where=""):
    """Nested lists, tuples and dicts of tensors and plain values are equal; floating-point tensors but for rounding."""
    assert type(found) is type(expected), (where, found, expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        tolerance = 0.02 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-6
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=where)
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert found == expected, where


class Maker:
    """Makes parameters, and optimizers of one class with fixed options."""

    def __init__(self, cls, options):
        self.cls, self.options = cls, options

    def params(self, dtype=torch.float64):
        return [torch.linspace(-1, 1, n, dtype=dtype).reshape(-1, 2).requires_grad_() for n in (6, 4)]

    def __call__(self, params, **options):
        return self.cls(params, **{**self.options, **options})

    def stepped(self, n_steps=2, dtype=torch.float64, named=False):
        params = self.params(dtype)
        optimizer = self([(f"p{i}", p) for i, p in enumerate(params)] if named else params)
        step_through(optimizer, params, n_steps)
        return params, optimizer


def seen(params, optimizer):
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())


@contextlib.contextmanager
def global_hooks(log):
    """Hooks of every optimizer's step, which log their names."""
    handles = [
        register_optimizer_step_pre_hook(lambda *_: log.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: log.append("global post")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named(name, program):
    """A program by another name, for those that a table makes."""
    program.__name__ = name
    return program


def with_torchs_class_and_ours(programs):
    """A test that runs each of the programs with torch's class and with fastopt's, and compares what they return."""

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("name", "options"), IN_TORCH, ids=str)
    @pytest.mark.parametrize("program", programs, ids=lambda program: program.__name__)
    def test(program, name, options):
        expected = program(Maker(getattr(THEIRS, name), options))
        assert_same(program(Maker(getattr(OURS, name), options)), expected)

    return test
