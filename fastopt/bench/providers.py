"""The implementations that are timed: torch's and fastopt's; ``benchmarks/libraries.py`` adds those of others."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastopt


class NotOffered(Exception):
    """A library has no such optimizer or loss."""


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable  # of an optimizer: (case, params) -> step; of a loss: (case) -> function of logits and target
    devices: tuple = ("cpu", "cuda")
    compiles: bool = False  # runs torch.compile
    writes_logits: bool = False


def _torch_step(case, params, **implementation):
    optimizer, cls = case.optimizer, case.optimizer.torch_class
    known = inspect.signature(cls).parameters if cls else {}
    wanted = [key for key, value in implementation.items() if value]
    if cls is None or not known.keys() >= set(wanted):
        raise NotOffered(" ".join(["torch has no", *wanted, optimizer.name]))
    return optimizer.timed(cls, params, **{key: value for key, value in implementation.items() if key in known}).step


def _fastopt_step(case, params):
    return case.optimizer.timed(getattr(fastopt, case.optimizer.name), params).step


def _loss(case, module=F, change=lambda function: function, **more):
    return functools.partial(change(getattr(module, case.loss.name)), **case.options, **more)


def _fastopt_loss(case):
    return _loss(case, fastopt.functional, **dict(inplace_backward=True) if case.trait == "in place" else {})


OPTIMIZERS = (
    Provider("torch for-loop", functools.partial(_torch_step, foreach=False)),
    Provider("torch foreach", functools.partial(_torch_step, foreach=True)),
    Provider("torch fused", functools.partial(_torch_step, fused=True)),
    Provider("torch compile", lambda case, params: torch.compile(_torch_step(case, params)), compiles=True),
    Provider("fastopt", _fastopt_step),
)
LOSSES = (
    Provider("torch", _loss),
    Provider("torch compile", functools.partial(_loss, change=torch.compile), compiles=True),
    Provider("fastopt", _fastopt_loss),
)


def providers_for(case, device):
    """All providers of the case's kind that know ``device``."""
    table = OPTIMIZERS if case.kind == "optimizer" else LOSSES
    return [provider for provider in table if device in provider.devices]
