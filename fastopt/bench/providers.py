"""Who is timed: torch's implementations, fastopt, and other libraries where they are installed."""

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

    @property
    def is_torch(self):
        return self.package == "torch"


# torch and fastopt.


def _torch_step(case, params, **how):
    cls = getattr(torch.optim, case.optimizer)
    if not how.keys() <= inspect.signature(cls).parameters.keys():
        raise NotOffered(f"torch has no {' '.join(how)} {case.optimizer}")
    return cls(params, **case.options, **how).step


def _torch_compile_step(case, params):
    return torch.compile(_torch_step(case, params))


def _fastopt_step(case, params):
    return getattr(fastopt, case.optimizer)(params, **case.options).step


def _torch_loss(case):
    return functools.partial(F.cross_entropy, label_smoothing=case.label_smoothing)


def _torch_compile_loss(case):
    return functools.partial(torch.compile(F.cross_entropy), label_smoothing=case.label_smoothing)


def _fastopt_loss(case):
    in_place = dict(inplace_backward=True) if case.is_in_place else {}
    return functools.partial(fastopt.functional.cross_entropy, label_smoothing=case.label_smoothing, **in_place)


# Other libraries: the same arithmetic as torch.optim asked of each, where its defaults are others.


def _pick(case, library, **classes):
    if case.optimizer not in classes:
        raise NotOffered(f"{library} has no {case.optimizer}")
    return classes[case.optimizer]


def _apex_step(case, params):
    from apex.optimizers import FusedAdam, FusedSGD

    adam = functools.partial(FusedAdam, adam_w_mode=case.optimizer == "AdamW")
    return _pick(case, "apex", SGD=FusedSGD, Adam=adam, AdamW=adam)(params, **case.options).step


def _optimi_step(case, params):
    import optimi

    adam = dict(betas=(0.9, 0.999), eps=1e-8)
    classes = dict(
        SGD=optimi.SGD,
        Adam=functools.partial(optimi.Adam, **adam),
        AdamW=functools.partial(optimi.AdamW, **adam),
    )
    return _pick(case, "optimi", **classes)(params, **case.options, kahan_sum=False).step


def _torchao_step(case, params):
    from torchao.optim import _AdamW  # states of 32 bits; the public classes quantize theirs

    adam = functools.partial(_AdamW, weight_decay=0.0)
    return _pick(case, "torchao", Adam=adam, AdamW=_AdamW)(params, **case.options).step


def _bitsandbytes_step(case, params):
    from bitsandbytes import optim

    if case.optimizer == "SGD" and not case.options.get("momentum"):
        raise NotOffered("bitsandbytes has no SGD without momentum")
    if case.options.get("centered"):
        raise NotOffered("bitsandbytes has no centered RMSprop")
    classes = dict(SGD=optim.SGD, RMSprop=optim.RMSprop, Adam=optim.Adam, AdamW=optim.AdamW)
    return _pick(case, "bitsandbytes", **classes)(params, **case.options).step


def _deepspeed_step(case, params):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    adam = functools.partial(DeepSpeedCPUAdam, adamw_mode=case.optimizer == "AdamW")
    return _pick(case, "DeepSpeed", Adam=adam, AdamW=adam)(params, **case.options).step


def _only_rows(case, library):
    if case.has_probabilities or len(case.shape) != 2:
        raise NotOffered(f"{library} takes rows of logits and class indices only")


def _liger_loss(case):
    from liger_kernel.transformers.functional import liger_cross_entropy

    _only_rows(case, "liger-kernel")
    return functools.partial(liger_cross_entropy, label_smoothing=case.label_smoothing)


def _flash_attn_loss(case):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    _only_rows(case, "flash-attn")
    options = dict(label_smoothing=case.label_smoothing, inplace_backward=case.is_in_place)
    return lambda logits, target: cross_entropy_loss(logits, target, **options)[0].mean()


def _apex_loss(case):
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    _only_rows(case, "apex")
    ignore_index = -100
    return lambda logits, target: SoftmaxCrossEntropyLoss.apply(
        logits, target, case.label_smoothing, ignore_index, False
    ).mean()


_CUDA = ("cuda",)

OPTIMIZERS = (
    Provider("torch for-loop", functools.partial(_torch_step, foreach=False)),
    Provider("torch foreach", functools.partial(_torch_step, foreach=True)),
    Provider("torch fused", functools.partial(_torch_step, fused=True)),
    Provider("torch compile", _torch_compile_step, compiles=True),
    Provider("fastopt", _fastopt_step, "fastopt"),
    Provider("apex", _apex_step, "apex", _CUDA),
    Provider("optimi", _optimi_step, "optimi"),
    Provider("torchao", _torchao_step, "torchao", compiles=True),
    Provider("bitsandbytes", _bitsandbytes_step, "bitsandbytes"),
    Provider("DeepSpeed", _deepspeed_step, "deepspeed", ("cpu",)),
)

LOSSES = (
    Provider("torch", _torch_loss),
    Provider("torch compile", _torch_compile_loss, compiles=True),
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
