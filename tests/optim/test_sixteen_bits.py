"""Steps in 16-bit types: every bit pattern, every rounding and every length, by the loops of this machine's level."""

import pytest
import torch

import fastopt
from optimizers import CONFIGURATIONS

pytestmark = pytest.mark.native

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def patterns(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def step(param, grad, **options):
    """A step of plain SGD: param - lr grad, in float32, rounded once."""
    param = torch.nn.Parameter(param.clone())
    param.grad = grad.clone()
    fastopt.SGD([param], **options).step()
    return param.detach()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_every_bit_pattern_is_read_and_written_unchanged(dtype):
    every = patterns(dtype)
    found = step(every, torch.zeros_like(every), lr=1.0)
    kept = found.view(torch.int16) == every.view(torch.int16)
    assert torch.all(kept | every.isnan())
    assert torch.equal(found.isnan(), every.isnan())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("lr", [1.0, 2.0**-9, 2.0**-12, 3.0, 2.0**-60])
def test_results_are_rounded_as_torch_rounds(dtype, lr):
    """Ties among them: half a unit of the last place is a power of two times the parameter."""
    every = patterns(dtype)
    generator = torch.Generator().manual_seed(0)
    for grad in (every, every.flip(0), every[torch.randperm(2**16, generator=generator)]):
        found = step(every, grad, lr=lr)
        truth = (every.float() - torch.tensor(lr) * grad.float()).to(dtype)
        same = (found.view(torch.int16) == truth.view(torch.int16)) | (found.isnan() & truth.isnan())
        # lr * grad + param is rounded once by some processors' instruction, twice by float32's operators.
        once = (every.double() - lr * grad.double()).to(dtype)
        assert torch.all(same | (found == once)), (every[~same], grad[~same], found[~same], truth[~same])


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_every_length_steps_each_element_on_its_own(name, options, dtype):
    """An element's step does not depend on how many others there are, nor is anything written behind the last."""
    n = 200
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator).to(dtype)
    grads = [torch.randn(n, generator=generator).to(dtype) for _ in range(3)]

    def stepped(lengths):
        memory = start.clone()
        params = [torch.nn.Parameter(part) for part in memory[: sum(lengths)].split(lengths)]
        optimizer = getattr(fastopt, name)(params, **options)
        for grad in grads:
            for param, part in zip(params, grad[: sum(lengths)].split(lengths), strict=True):
                param.grad = part.clone()
            optimizer.step()
        return memory

    whole = stepped([n])
    single = stepped([1] * n)
    torch.testing.assert_close(single, whole, rtol=0, atol=0)
    for length in range(1, n):
        torch.testing.assert_close(stepped([length])[:length], whole[:length], rtol=0, atol=0)
        torch.testing.assert_close(stepped([length])[length:], start[length:], rtol=0, atol=0)
