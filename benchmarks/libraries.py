"""``python -m fastopt bench`` with the optimizers and losses of other libraries, where they are installed.

python benchmarks/libraries.py [the options of python -m fastopt bench]
"""

import argparse
import functools
import importlib.util
import sys

from fastopt import __main__ as fastopt_main
from fastopt._arguments import EXIT_STATUS
from fastopt.bench import cli, providers, tables


def library(name, module, devices=tables.BOTH, compiles=False, **classes):
    """A provider of optimizers, and its package.

    Of each optimizer there is its class in ``module``, and the options that make it compute as torch's.
    """

    def step(case, params):
        if case.optimizer.name not in classes:
            raise providers.NotOffered(f"{name} has no {case.optimizer.name}")
        cls, options = classes[case.optimizer.name]
        return case.optimizer.timed(getattr(importlib.import_module(module), cls), params, **options).step

    return providers.Provider(name, step, devices, compiles), module.split(".")[0]


def _only_rows(case, library):
    if case.loss.name != "cross_entropy" or case.target != "indices" or len(case.shape) != 2:
        raise providers.NotOffered(f"{library} takes rows of logits and class indices only")


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


_OPTIMI = dict(kahan_sum=False)
_OPTIMI_ADAM = dict(kahan_sum=False, betas=(0.9, 0.999), eps=1e-8)
# Each with its package.
OPTIMIZERS = (
    library(
        "apex",
        "apex.optimizers",
        tables.CUDA,
        SGD=("FusedSGD", {}),
        Adam=("FusedAdam", dict(adam_w_mode=False)),
        AdamW=("FusedAdam", dict(adam_w_mode=True)),
    ),
    library("optimi", "optimi", SGD=("SGD", _OPTIMI), Adam=("Adam", _OPTIMI_ADAM), AdamW=("AdamW", _OPTIMI_ADAM)),
    # The public classes of torchao quantize their states.
    library("torchao", "torchao.optim", compiles=True, Adam=("_AdamW", dict(weight_decay=0.0)), AdamW=("_AdamW", {})),
    library("bitsandbytes", "bitsandbytes.optim", **{name: (name, {}) for name in ("SGD", "RMSprop", "Adam", "AdamW")}),
    library(
        "DeepSpeed",
        "deepspeed.ops.adam",
        tables.CPU,
        **{name: ("DeepSpeedCPUAdam", dict(adamw_mode=name == "AdamW")) for name in ("Adam", "AdamW")},
    ),
)
LOSSES = (
    (providers.Provider("apex", _apex_loss, tables.CUDA), "apex"),
    (providers.Provider("flash-attn", _flash_attn_loss, tables.CUDA), "flash_attn"),
    (providers.Provider("liger-kernel", _liger_loss, tables.CUDA, writes_logits=True), "liger_kernel"),
)


def is_installed(package):
    return importlib.util.find_spec(package) is not None


# Children of the benchmark import this file too, and so know these providers.
providers.OPTIMIZERS += tuple(provider for provider, package in OPTIMIZERS if is_installed(package))
providers.LOSSES += tuple(provider for provider, package in LOSSES if is_installed(package))


def main(argv=None):
    """Time the cases and return the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/libraries.py", epilog=EXIT_STATUS)
    cli.add_arguments(parser)
    return fastopt_main.main(argv, parser, _run)


def _run(args, parser):
    known = {package for provider, package in (*OPTIMIZERS, *LOSSES) if args.device in provider.devices}
    return cli.run(args, parser, sorted(package for package in known if not is_installed(package)))


if __name__ == "__main__":
    sys.exit(main())
