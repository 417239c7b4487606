"""The implementations that are timed: torch's, fastopt's, and those of other libraries where they are installed."""

import functools
import importlib
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


def _library(name, module, devices=("cpu", "cuda"), compiles=False, **classes):
    """A provider of optimizers: of each its class in ``module``, and the options that make it compute as torch's."""

    def step(case, params):
        if case.optimizer.name not in classes:
            raise NotOffered(f"{name} has no {case.optimizer.name}")
        cls, options = classes[case.optimizer.name]
        return case.optimizer.timed(getattr(importlib.import_module(module), cls), params, **options).step

    return Provider(name, step, module.split(".")[0], devices, compiles)


def _fastopt_loss(case):
    in_place = dict(inplace_backward=True) if case.trait == "in place" else {}
    return functools.partial(getattr(fastopt.functional, case.loss.name), **case.options, **in_place)


def _only_rows(case, library):
    if case.loss.name != "cross_entropy" or case.target != "indices" or len(case.shape) != 2:
        raise NotOffered(f"{library} takes rows of logits and class indices only")


def _liger_loss(case):
    from liger_kernel.transformers.functional import liger_cross_entropy

    _only_rows(case, "liger-kernel")
    return functools.partial(liger_cross_entropy, **case.options)


def _flash_attn_loss(case):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    _only_rows(case, "flash-attn")
    options = dict(case.options, inplace_backward=case.trait == "in place")
    return lambda logits, target: cross_entropy_loss(logits, target, **options)[0].mean()


def _apex_loss(case):
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    _only_rows(case, "apex")
    smoothing, ignore_index = case.options.get("label_smoothing", 0.0), -100
    return lambda logits, target: SoftmaxCrossEntropyLoss.apply(logits, target, smoothing, ignore_index, False).mean()


_CUDA = ("cuda",)
_OPTIMI = dict(kahan_sum=False)
_OPTIMI_ADAM = dict(kahan_sum=False, betas=(0.9, 0.999), eps=1e-8)

OPTIMIZERS = (
    Provider("torch for-loop", functools.partial(_torch_step, foreach=False)),
    Provider("torch foreach", functools.partial(_torch_step, foreach=True)),
    Provider("torch fused", functools.partial(_torch_step, fused=True)),
    Provider("torch compile", lambda case, params: torch.compile(_torch_step(case, params)), compiles=True),
    Provider("fastopt", _fastopt_step, "fastopt"),
    _library(
        "apex",
        "apex.optimizers",
        _CUDA,
        SGD=("FusedSGD", {}),
        Adam=("FusedAdam", dict(adam_w_mode=False)),
        AdamW=("FusedAdam", dict(adam_w_mode=True)),
    ),
    _library("optimi", "optimi", SGD=("SGD", _OPTIMI), Adam=("Adam", _OPTIMI_ADAM), AdamW=("AdamW", _OPTIMI_ADAM)),
    # The public classes of torchao quantize their states.
    _library("torchao", "torchao.optim", compiles=True, Adam=("_AdamW", dict(weight_decay=0.0)), AdamW=("_AdamW", {})),
    _library(
        "bitsandbytes", "bitsandbytes.optim", **{name: (name, {}) for name in ("SGD", "RMSprop", "Adam", "AdamW")}
    ),
    _library(
        "DeepSpeed",
        "deepspeed.ops.adam",
        ("cpu",),
        **{name: ("DeepSpeedCPUAdam", dict(adamw_mode=name == "AdamW")) for name in ("Adam", "AdamW")},
    ),
)

LOSSES = (
    Provider("torch", lambda case: functools.partial(getattr(F, case.loss.name), **case.options)),
    Provider(
        "torch compile",
        lambda case: functools.partial(torch.compile(getattr(F, case.loss.name)), **case.options),
        compiles=True,
    ),
    Provider("fastopt", _fastopt_loss, "fastopt"),
    Provider("apex", _apex_loss, "apex", _CUDA),
    Provider("flash-attn", _flash_attn_loss, "flash_attn", _CUDA),
    Provider("liger-kernel", _liger_loss, "liger_kernel", _CUDA, writes_logits=True),
)


def providers_for(case, device):
    """All providers of the case's kind that know ``device``, installed or not."""
    table = OPTIMIZERS if case.kind == "optimizer" else LOSSES
    return [provider for provider in table if device in provider.devices]


def not_installed(device):
    """Packages that would be timed on ``device`` if they were installed."""
    known = [provider for provider in (*OPTIMIZERS, *LOSSES) if device in provider.devices]
    return sorted({provider.package for provider in known if not provider.is_installed})
