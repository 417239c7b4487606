"""The table of odd hyper-parameters and groups, and where we differ from torch on purpose."""

import fractions

import numpy as np
import torch

NAN, INF = float("nan"), float("inf")


def group(**values):
    return lambda params, optimizer: optimizer.param_groups[1].update(values)


def without(name):
    return lambda params, optimizer: optimizer.param_groups[1].pop(name, None)


def group_is_no_dict(params, optimizer):
    optimizer.param_groups[1] = [params[1]]


def groups_are_a_tuple(params, optimizer):
    optimizer.param_groups = tuple(optimizer.param_groups)


def parameter_is_a_number(params, optimizer):
    optimizer.param_groups[1]["params"] = [3.0]


def parameters_are_a_tuple(params, optimizer):
    optimizer.param_groups[1]["params"] = (params[1],)


def parameters_are_none(params, optimizer):
    optimizer.param_groups[1]["params"] = None


class OtherPair(tuple):
    def __iter__(self):
        return iter((0.25, 0.5))


OPTIONS = {
    "lr text": group(lr="fast"),
    "lr None": group(lr=None),
    "lr missing": without("lr"),
    "lr a list": group(lr=[0.1]),
    "lr complex": group(lr=0.1 + 1j),
    "lr NaN": group(lr=NAN),
    "lr beyond float32": group(lr=1e39),
    "lr the largest of float64": group(lr=1.7e308),
    "lr negative, beyond float32": group(lr=-1e39),
    "lr a tensor beyond float32": group(lr=torch.tensor(1e39, dtype=torch.float64)),
    "lr infinite": group(lr=INF),
    "lr negative": group(lr=-0.1),
    "lr True": group(lr=True),
    "lr an int too large for a float": group(lr=10**400),
    "lr a NumPy float32": group(lr=np.float32(0.125)),
    "lr a NumPy float64": group(lr=np.float64(0.125)),
    "lr a NumPy array of no dimension": group(lr=np.array(0.125)),
    "lr a NumPy bool": group(lr=np.True_),
    "lr a NumPy array": group(lr=np.array([0.125])),
    "lr a fraction": group(lr=fractions.Fraction(1, 8)),
    "lr a tensor": group(lr=torch.tensor(0.125)),
    "lr a tensor of one dimension": group(lr=torch.tensor([0.125])),
    "lr a tensor of two numbers": group(lr=torch.tensor([0.125, 0.5])),
    "lr a tensor of int64": group(lr=torch.tensor(1)),
    "lr a tensor on meta": group(lr=torch.tensor(0.125, device="meta")),
    "lr a tensor that requires grad": group(lr=torch.tensor(0.125, requires_grad=True)),
    "weight_decay text": group(weight_decay="0.1"),
    "weight_decay None": group(weight_decay=None),
    "weight_decay missing": without("weight_decay"),
    "weight_decay negative": group(weight_decay=-0.03),
    "weight_decay NaN": group(weight_decay=NAN),
    "weight_decay beyond float32": group(weight_decay=1e39),
    "weight_decay that is, times lr": group(weight_decay=1e30, lr=1e30),
    "weight_decay a tensor": group(weight_decay=torch.tensor(0.5)),
    "momentum None": group(momentum=None),
    "momentum text": group(momentum="0.9"),
    "momentum negative": group(momentum=-0.5),
    "momentum NaN": group(momentum=NAN),
    "momentum beyond float32": group(momentum=1e39),
    "momentum 0": group(momentum=0),
    "momentum above 1": group(momentum=1.5),
    "momentum missing": without("momentum"),
    "dampening None": group(dampening=None),
    "dampening 2": group(dampening=2),
    "dampening beyond float32": group(dampening=1e39),
    "nesterov a number": group(nesterov=1),
    "nesterov None": group(nesterov=None),
    "maximize text": group(maximize="no"),
    "maximize None": group(maximize=None),
    "maximize missing": without("maximize"),
    "maximize an array of two": group(maximize=np.ones(2)),
    "alpha text": group(alpha="0.9"),
    "alpha above 1": group(alpha=1.5),
    "alpha NaN": group(alpha=NAN),
    "alpha beyond float32": group(alpha=1e39),
    "centered switched": lambda p, o: o.param_groups[1].update(centered=not o.param_groups[1].get("centered")),
    "eps negative": group(eps=-1e-8),
    "eps 0": group(eps=0),
    "eps beyond float32": group(eps=1e39),
    "eps infinite": group(eps=INF),
    "eps None": group(eps=None),
    "eps missing": without("eps"),
    "betas of one": group(betas=(0.9,)),
    "betas of three": group(betas=(0.9, 0.99, 0.999)),
    "betas a number": group(betas=0.9),
    "betas None": group(betas=None),
    "betas text": group(betas=("0.9", "0.99")),
    "betas a list": group(betas=[0.5, 0.75]),
    "betas of a tuple that iterates in its own way": group(betas=OtherPair((0.5, 0.75))),
    "betas tensors": group(betas=(torch.tensor(0.5), torch.tensor(0.75))),
    "betas an array": group(betas=np.array([0.5, 0.75])),
    "betas above 1": group(betas=(1.5, 2.0)),
    "betas 1": group(betas=(1.0, 1.0)),
    "betas 0": group(betas=(0.0, 0.0)),
    "betas NaN": group(betas=(NAN, 0.9)),
    "amsgrad switched": lambda p, o: o.param_groups[1].update(amsgrad=not o.param_groups[1].get("amsgrad")),
    "amsgrad None": group(amsgrad=None),
    "capturable": group(capturable=True),
    "differentiable": group(differentiable=True),
    "foreach": group(foreach=True),
    "foreach and fused": group(foreach=True, fused=True),
    "group that is no dict": group_is_no_dict,
    "groups a tuple": groups_are_a_tuple,
    "params a tuple": parameters_are_a_tuple,
    "params None": parameters_are_none,
    "params a number": parameter_is_a_number,
}

NUMBER = "must be a number, got"
# Torch raises from deep inside, if at all at the first step; ours names argument, rule and value.
CLEARER = {
    "lr a NumPy bool": (TypeError, f"lr {NUMBER} np.True_"),
    "lr text": (TypeError, f"lr {NUMBER} 'fast'"),
    "lr None": (TypeError, f"lr {NUMBER} None"),
    "lr a list": (TypeError, rf"lr {NUMBER} \[0.1\]"),
    "lr complex": (TypeError, rf"lr {NUMBER} \(0.1\+1j\)"),
    "lr a NumPy array": (TypeError, rf"lr {NUMBER} array\(\[0.125\]\)"),
    "lr a tensor of two numbers": (TypeError, rf"lr {NUMBER} tensor\(\[0.1250, 0.5000\]\)"),
    "lr an int too large for a float": (OverflowError, "int too large to convert to float"),
    "weight_decay text": (TypeError, f"weight_decay {NUMBER} '0.1'"),
    "weight_decay None": (TypeError, f"weight_decay {NUMBER} None"),
    "momentum text": (TypeError, f"momentum {NUMBER} '0.9'"),
    "momentum None": (TypeError, f"momentum {NUMBER} None"),
    "dampening None": (TypeError, f"dampening {NUMBER} None"),
    "alpha text": (TypeError, f"alpha {NUMBER} '0.9'"),
    "eps None": (TypeError, f"eps {NUMBER} None"),
    "betas text": (TypeError, f"betas {NUMBER} '0.9'"),
}
# Torch's SGD and RMSprop refuse what its Adam takes; we take it everywhere.
TAKEN = {"lr a fraction": dict(lr=0.125), "lr a NumPy array of no dimension": dict(lr=0.125)}
# A centered variance below 0: torch's is NaN; ours is 0, as rounding below 0 should not ruin a run.
NEGATIVE_VARIANCE = {"alpha above 1", "last state negative", "state that is the parameter"}
