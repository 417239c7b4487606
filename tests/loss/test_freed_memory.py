"""Tensors whose storage was freed while they live on, as FSDP frees them: RuntimeError, and nothing is read."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import is_native, kernel_calls
from loss_cases import make_values
from paths import ROOT

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

cross_entropy = fastopt.functional.cross_entropy
SIZES = [(4, 5), (5,), (2, 5, 3), (1, 40000)]


def freed(tensor, n_bytes=0):
    tensor.untyped_storage().resize_(n_bytes)
    return tensor


def arguments(sizes, dtype, probabilities):
    dim = 1 if len(sizes) > 1 else 0
    x = make_values(sizes, dtype)
    target = x.softmax(dim) if probabilities else x.argmax(dim)
    return {"input": x, "target": target, "weight": torch.ones(sizes[dim], dtype=dtype)}


def laid_out(tensor, layout):
    if layout == "whole" or tensor.dim() == 0:
        return tensor
    room = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1]))
    return room[..., ::2].copy_(tensor) if layout == "strided" else room[..., tensor.shape[-1] :].copy_(tensor)


@pytest.mark.native  # torch's own functions read some of these
@pytest.mark.parametrize("name", ["input", "target", "weight"])
@pytest.mark.parametrize("layout", ["whole", "strided", "offset"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_freed_argument_raises(name, layout, probabilities, dtype, sizes):
    for requires_grad in (False, True):
        for inplace_backward in (False, True):
            given = arguments(sizes, dtype, probabilities)
            given[name] = laid_out(given[name], layout)
            given["input"] = (given["input"].requires_grad_(requires_grad) if layout == "whole" else given["input"])[:]
            given[name].untyped_storage().resize_(0)
            before = kernel_calls("cross_entropy")
            with pytest.raises(RuntimeError):
                cross_entropy(**given, inplace_backward=inplace_backward)
            assert kernel_calls("cross_entropy") == before


@pytest.mark.native
@pytest.mark.parametrize("name", ["input", "target", "weight"])
@pytest.mark.parametrize("layout", ["whole", "strided", "offset"])
def test_a_storage_that_is_an_element_short_raises(name, layout):
    given = arguments((4, 5), torch.float32, False)
    given[name] = laid_out(given[name], layout)
    strides = zip(given[name].shape, given[name].stride(), strict=True)
    last = given[name].storage_offset() + sum((size - 1) * stride for size, stride in strides)
    freed(given[name], last * given[name].itemsize)
    with pytest.raises(RuntimeError, match="its data is not allocated yet"):
        cross_entropy(**given)
    freed(given[name], (last + 1) * given[name].itemsize)  # all of it again, of undefined values
    given[name].zero_()
    assert cross_entropy(**given).dtype == torch.float32


@pytest.mark.native
@pytest.mark.parametrize("name", ["input", "target", "weight"])
@pytest.mark.parametrize("wide", [5, 300])
def test_an_argument_freed_between_a_forward_and_its_backward_in_place_raises(name, wide):
    given = arguments((4, wide), torch.float32, False)
    leaf = given["input"].requires_grad_()
    given["input"] = leaf * 1
    loss = cross_entropy(**given, inplace_backward=True)
    freed(given[name])
    with pytest.raises(RuntimeError, match="its data is not allocated yet"):
        loss.backward()
    assert leaf.grad is None


def test_logits_freed_after_a_plain_forward_are_not_needed_or_raise():
    leaf = make_values((4, 5)).requires_grad_()
    for function in (F.cross_entropy, cross_entropy):
        x = leaf * 1
        loss = function(x, torch.arange(4))
        freed(x)
        leaf.grad = None
        loss.backward()
        assert leaf.grad.norm() > 0
    x = leaf * 1
    loss = cross_entropy(x, torch.arange(4))
    freed(x)
    if is_native():  # torch saves the logarithms of probabilities instead
        with pytest.raises(RuntimeError):
            torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.native
def test_a_freed_losss_gradient_raises():
    for reduction in ("mean", "none"):
        leaf = make_values((4, 5)).requires_grad_()
        loss = cross_entropy(leaf * 1, torch.arange(4), reduction=reduction)
        with pytest.raises(RuntimeError):
            loss.backward(freed(torch.ones_like(loss)))


@pytest.mark.native
def test_a_saved_gradient_that_a_hook_gives_back_freed_raises():
    """Unpacked where it was computed, and freed since."""
    leaf = make_values((4, 5)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), freed):
        loss = cross_entropy(leaf * 1, torch.arange(4))
    for factor in (1.0, 2.0):
        with pytest.raises(RuntimeError):
            loss.backward(torch.tensor(factor), retain_graph=True)


FREED = """
    import torch, fastopt
    x = torch.randn(4, 5)
    x.untyped_storage().resize_(0)
    try:
        fastopt.functional.cross_entropy(x, torch.arange(4))
    except RuntimeError as error:
        print("raised")
"""


@pytest.mark.slow
def test_logits_that_were_freed_do_not_crash_the_process():
    """By itself: where it is not so, the others end with the process."""
    command = [sys.executable, "-c", textwrap.dedent(FREED)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.stdout == "raised\n", (result.returncode, result.stderr[-2000:])
