"""The table of odd calls of an optimizer's methods, and the optimizer that all tables of bad calls spoil."""

import torch

from optimizers import WITH_STATES

CLASSES = {name: dict(options, lr=0.1) for name, options in WITH_STATES.items()}


def make(cls, n_steps, options):
    """An optimizer of two parameters in two groups, some steps on its way, gradients in place."""
    params = [torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), torch.nn.Parameter(torch.arange(6.0).view(2, 3))]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], **options)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    for _ in range(n_steps):
        optimizer.step()
    return params, optimizer


def raising():
    raise KeyError("in the closure")


def no_arguments_please(loss):
    return loss


def stepping_with(*args, **kwargs):
    return lambda params, optimizer: optimizer.step(*args, **kwargs)


def adding(group):
    return lambda params, optimizer: optimizer.add_param_group(group(params))


def loading(change):
    def call(params, optimizer):
        state_dict = optimizer.state_dict()
        replaced = change(state_dict)
        optimizer.load_state_dict(state_dict if replaced is None else replaced)

    return call


CALLS = {
    "closure raises": stepping_with(raising),
    "closure wants an argument": stepping_with(no_arguments_please),
    "closure is a number": stepping_with(5),
    "closure is False": stepping_with(False),
    "closure returns nothing": stepping_with(lambda: None),
    "closure by keyword": stepping_with(closure=lambda: 2.5),
    "two closures": stepping_with(None, None),
    "unknown keyword": stepping_with(model=None),
    "group a list": adding(lambda params: [torch.nn.Parameter(torch.ones(2))]),
    "group without params": adding(lambda params: {"lr": 0.1}),
    "group of a parameter that is there": adding(lambda params: {"params": [params[0]]}),
    "group of a set": adding(lambda params: {"params": {torch.nn.Parameter(torch.ones(2))}}),
    "group of a number": adding(lambda params: {"params": [1.0]}),
    "group of text": adding(lambda params: {"params": "weights"}),
    "group of a result": adding(lambda params: {"params": [params[0] * 2]}),
    "load None": lambda params, optimizer: optimizer.load_state_dict(None),
    "load an empty dict": loading(lambda s: {}),
    "load fewer groups": loading(lambda s: s["param_groups"].pop() and None),
    "load a larger group": loading(lambda s: s["param_groups"][0]["params"].append(7)),
    "load a group without params": loading(lambda s: s["param_groups"][0].pop("params") and None),
    "load groups that are text": loading(lambda s: {**s, "param_groups": ["text", "text"]}),
    "zero_grad with an unknown keyword": lambda params, optimizer: optimizer.zero_grad(to_none=True),
}
