"""What the tests of optimizers against torch's share: gradients for any dtype, and outcomes that may be errors."""

import torch


def outcome(call):
    """What a call returns, or the exception it raises."""
    try:
        return call()
    except Exception as failure:
        return failure


def step_through(optimizer, params, n_steps, first=0):
    """Steps with gradients that depend on the step alone, the same for any dtype but for rounding."""
    for step in range(first, first + n_steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            wide = torch.complex128 if p.is_complex() else torch.float64
            p.grad = torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype)
        optimizer.step()
