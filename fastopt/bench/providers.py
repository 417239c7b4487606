"""The implementations that are timed: torch's and fastopt's; ``benchmarks/libraries.py`` adds those of others."""

import functools
import importlib.util
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
    package: str = "torch"
    devices: tuple = ("cpu", "cuda")
    compiles: bool = False  # runs torch.compile
    writes_logits: bool = False

    @property
    def is_installed(self):
        return importlib.util.find_spec(self.package) is not None


def _torch_step(case, params, **implementation):
    cls, name = case.optimizer.torch_class, case.optimizer.name
    known = inspect.signature(cls).parameters if cls else {}
    wanted = [key for key, value in implementation.items() if value]
    if cls is None or not known.keys() >= set(wanted):
        raise NotOffered(" ".join(["torch has no", *wanted, name]))
    return case.optimizer.timed(
        cls, params, **{key: implementation[key] for key in implementation if key in known}
    ).step


def _fastopt_step(case, params):
    return case.optimizer.timed(getattr(fastopt, case.optimizer.name), params).step


def _fastopt_loss(case):
    in_place = dict(inplace_backward=True) if case.trait == "in place" else {}
    return functools.partial(getattr(fastopt.functional, case.loss.name), **case.options, **in_place)


OPTIMIZERS = (
    Provider("torch for-loop", functools.partial(_torch_step, foreach=False)),
    Provider("torch foreach", functools.partial(_torch_step, foreach=True)),
    Provider("torch fused", functools.partial(_torch_step, fused=True)),
    Provider("torch compile", lambda case, params: torch.compile(_torch_step(case, params)), compiles=True),
    Provider("fastopt", _fastopt_step, "fastopt"),
)

LOSSES = (
    Provider("torch", lambda case: functools.partial(getattr(F, case.loss.name), **case.options)),
    Provider(
        "torch compile",
        lambda case: functools.partial(torch.compile(getattr(F, case.loss.name)), **case.options),
        compiles=True,
    ),
    Provider("fastopt", _fastopt_loss, "fastopt"),
)


def providers_for(case, device):
    """All providers of the case's kind that know ``device``, installed or not."""
    table = OPTIMIZERS if case.kind == "optimizer" else LOSSES
    return [provider for provider in table if device in provider.devices]


def not_installed(device):
    """Packages that would be timed on ``device`` if they were installed."""
    known = [provider for provider in (*OPTIMIZERS, *LOSSES) if device in provider.devices]
    return sorted({provider.package for provider in known if not provider.is_installed})
