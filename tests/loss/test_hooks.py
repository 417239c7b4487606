"""Hooks around cross-entropy: how often they run, and which gradient they see."""

import functools

import pytest
import torch
import torch.nn.functional as F

import devices
from loss_helpers import PROBLEMS, assert_as_torch, cross_entropy, make_problem, problems

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)


def tripled(grad):
    return grad * 3


def hook_on_a_result(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 1
    y.register_hook(tripled)
    loss(function, y).backward(create_graph=True)
    return leaf.grad


def hook_on_a_leaf(function, x, loss):
    x.requires_grad_().register_hook(tripled)
    loss(function, x).backward(create_graph=True)
    return x.grad


def hook_on_a_view(function, x, loss):
    leaf = x.requires_grad_()
    y = (leaf * 2).view(x.shape)
    y.register_hook(tripled)
    loss(function, y[:]).backward(create_graph=True)
    return leaf.grad


def hook_on_the_loss(function, x, loss):
    leaf = x.requires_grad_()
    value = loss(function, leaf * 1)
    value.register_hook(tripled)
    value.backward(create_graph=True)
    return leaf.grad


def hooks_counted(function, x, loss):
    seen = []
    leaf = x.requires_grad_()
    y = leaf * 1
    y.register_hook(lambda grad: seen.append(grad.detach().clone()))
    leaf.register_hook(lambda grad: seen.append(grad.detach().clone()))
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(inputs[0].detach().clone()))
    y.grad_fn.register_prehook(lambda outputs: seen.append(outputs[0].detach().clone()))
    leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.detach().clone()))
    loss(function, y).backward(create_graph=True)
    return seen


def hooks_of_the_losss_node_counted(function, x, loss):
    seen = []
    value = loss(function, x.requires_grad_() * 1)
    value.grad_fn.register_hook(lambda inputs, outputs: seen.append(len(inputs)))
    value.grad_fn.register_prehook(lambda outputs: seen.append(len(outputs)))
    value.backward(create_graph=True)
    return seen


def retained_grads(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 2
    z = y.reshape(x.shape)
    for tensor in (y, z):
        tensor.retain_grad()
    loss(function, z).backward(create_graph=True)
    return y.grad, z.grad, leaf.grad


def retained_grads_of_two_losses(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 2
    y.retain_grad()
    (loss(function, y) + loss(function, y * y)).backward(create_graph=True)
    return y.grad, leaf.grad


def multi_grad_hook(mode, function, x, loss):
    seen = []
    leaf = x.requires_grad_()
    y, z = leaf * 1, leaf * 2
    torch.autograd.graph.register_multi_grad_hook((y, z), lambda grads: seen.append(1), mode=mode)
    (loss(function, y) + loss(function, z)).backward(create_graph=True)
    return torch.tensor(len(seen)), leaf.grad


def differentiated_again_in_a_hook(function, x, loss, **keeps_graph):
    seen = []
    leaf = x.requires_grad_()
    y = leaf * 1
    value = loss(function, y)

    def again(grad):
        if not seen:
            seen.append(None)
            seen.append(torch.autograd.grad(value, leaf, **keeps_graph)[0].detach())

    y.register_hook(again)
    (grad,) = torch.autograd.grad(value, leaf, **keeps_graph)
    return grad, seen[1]


def hook_differentiates_the_loss_again(function, x, loss):
    return differentiated_again_in_a_hook(function, x, loss, create_graph=True)


def hook_differentiates_the_plain_loss_again(function, x, loss):
    """Without create_graph; the graph is kept for the hook."""
    return differentiated_again_in_a_hook(function, x, loss, retain_graph=True)


def hook_on_the_loss_differentiates_it_again(function, x, loss):
    seen = []
    leaf = x.requires_grad_()
    value = loss(function, leaf)

    def again(grad):
        if not seen:
            seen.append(None)
            seen.append(torch.autograd.grad(value, leaf, create_graph=True)[0].detach())

    value.register_hook(again)
    return torch.autograd.grad(value, leaf, create_graph=True)[0], seen[1]


def hook_in_the_second_derivative(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 1
    y.register_hook(lambda grad: grad * 2)
    (grad,) = torch.autograd.grad(loss(function, y), leaf, create_graph=True)
    grad.register_hook(tripled)
    grad.pow(2).sum().backward(create_graph=True)
    second = leaf.grad.clone()
    return grad, second, torch.autograd.grad(second.pow(2).sum(), leaf)[0]


def triple_derivative(function, x, loss):
    derivatives = [loss(function, x.requires_grad_() * 1)]
    for _ in range(3):
        derivatives.append(torch.autograd.grad(derivatives[-1].pow(2).sum(), x, create_graph=True)[0])
    return derivatives


def gradient_penalty(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf.sin()
    y.register_hook(tripled)
    value = loss(function, y)
    (grad,) = torch.autograd.grad(value, y, create_graph=True)
    (value + grad.pow(2).sum()).backward()
    return leaf.grad


def anomaly_mode(function, x, loss):
    with torch.autograd.detect_anomaly(), torch.autograd.set_multithreading_enabled(False):
        return hook_on_a_result(function, x, loss)


def two_inputs(function, x, loss):
    leaf = x.requires_grad_()
    scale = torch.ones(x.shape[1:], dtype=x.dtype, requires_grad=True)
    y = leaf * scale
    return torch.autograd.grad(loss(function, y), [leaf, y, scale], create_graph=True)


HOOKS = [
    hook_on_a_result,
    hook_on_a_leaf,
    hook_on_a_view,
    hook_on_the_loss,
    hooks_counted,
    hooks_of_the_losss_node_counted,
    retained_grads,
    retained_grads_of_two_losses,
    functools.partial(multi_grad_hook, "all"),
    functools.partial(multi_grad_hook, "any"),
    hook_differentiates_the_loss_again,
    hook_differentiates_the_plain_loss_again,
    hook_on_the_loss_differentiates_it_again,
    hook_in_the_second_derivative,
    triple_derivative,
    gradient_penalty,
    anomaly_mode,
    two_inputs,
]


def name_of(case):
    return f"{case.func.__name__}-{case.args[0]}" if isinstance(case, functools.partial) else case.__name__


@pytest.mark.filterwarnings("ignore")
@problems
@pytest.mark.parametrize("run", HOOKS, ids=name_of)
def test_hooks_run_as_often_as_in_torch_and_see_its_gradients(run, problem):
    x, loss = make_problem(**PROBLEMS[problem])
    assert_as_torch(lambda function: run(function, x.clone(), loss), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", HOOKS[:8], ids=name_of)
def test_hooks_on_logits_that_a_backward_may_overwrite_run_as_often(run):
    x, loss = make_problem()
    if run is hook_on_a_leaf:
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            run(functools.partial(cross_entropy, inplace_backward=True), x.clone(), loss)
        return
    ours = run(functools.partial(cross_entropy, inplace_backward=True), x.clone(), loss)
    torch.testing.assert_close(ours, run(F.cross_entropy, x.clone(), loss))
