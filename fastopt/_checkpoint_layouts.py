"""Options and states of each optimizer as other libraries save them."""

import torch

from . import optim

_ADAM = ("lr", "betas", "eps", "weight_decay")
# Options that no result depends on: how torch computes, names of parameters, what torch's schedulers keep in groups.
_HARMLESS = {"capturable", "differentiable", "foreach", "fused", "params", "param_names"}
_HARMLESS |= {"base_momentum", "initial_lr", "max_lr", "max_momentum", "min_lr", "swa_lr"}
_BITSANDBYTES = {*_ADAM, "alpha", "t_alpha", "t_beta3"}  # the last three are of AdEMAMix


class Adam:
    counts, scalars = True, ()
    bitsandbytes_states = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    optional = ("max_exp_avg_sq",)

    @staticmethod
    def states(options):
        return ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * bool(options["amsgrad"])

    @staticmethod
    def from_same_names(saved, own):
        _require(saved, _ADAM)
        is_known = saved.keys() & {"amsgrad", "bias_correction"}
        corrects_bias = saved.pop("bias_correction", True)
        saved.pop("step", None)
        options = _with_own(saved, own)
        if not is_known:  # RAdam, LAMB and others save all the rest of it
            raise ValueError(
                f"param_groups must have amsgrad or bias_correction, as each Adam does, got {', '.join(saved)}"
            )
        if not corrects_bias:
            raise ValueError(f"bias_correction must be True, for Adam always corrects its bias, got {corrects_bias}")
        return options

    @staticmethod
    def from_bitsandbytes(saved, own):
        _require(saved, _ADAM)
        if saved["weight_decay"] != 0 and not own["decoupled_weight_decay"]:
            raise ValueError(
                "optimizer must decouple weight decay (AdamW), as each Adam of bitsandbytes does, "
                f"or weight_decay be 0, got {saved['weight_decay']}"
            )
        if len(saved["betas"]) != 2 or saved.pop("alpha", 0) != 0:
            raise ValueError(f"betas must be two numbers and alpha 0, got {saved['betas']}: this is no state of Adam")
        saved.pop("t_alpha", None), saved.pop("t_beta3", None)
        return _with_own(saved, own)


class AdamW(Adam):
    @staticmethod
    def from_same_names(saved, own):
        options = Adam.from_same_names(saved, own)
        # torch.optim.AdamW decouples the decay whatever it loads.
        if options["weight_decay"] != 0 and not options["decoupled_weight_decay"]:
            raise ValueError(
                "optimizer must not decouple weight decay (Adam), as what saved the state did not, "
                f"or weight_decay be 0, got {options['weight_decay']}"
            )
        return options


class Sgd:
    counts, scalars = False, ()
    bitsandbytes_states = {"state1": "momentum_buffer"}
    optional = ("step",)

    @staticmethod
    def states(options):
        return ("momentum_buffer",) * bool(options["momentum"])

    @staticmethod
    def from_same_names(saved, own):
        _require(saved, ("lr", "momentum", "dampening", "weight_decay", "nesterov"))
        return _with_own(saved, own)

    @staticmethod
    def from_bitsandbytes(saved, own):
        _require(saved, ("lr", "betas", "weight_decay"))
        saved["momentum"], dampening = _two(saved.pop("betas"))
        eps = saved.pop("eps", 0)
        if eps != 0:
            raise ValueError(f"eps must be 0 in bitsandbytes' SGD, got {eps}: this is no state of SGD")
        if dampening != 0:
            raise ValueError(f"dampening must be 0, for bitsandbytes' SGD never applied it, got {dampening}")
        return _with_own({**saved, "dampening": 0.0}, own)


class RmsProp:
    counts, scalars = True, ()
    bitsandbytes_states = {"state1": "square_avg"}
    optional = ()

    @staticmethod
    def states(options):
        return ("square_avg",) + ("momentum_buffer",) * (options["momentum"] > 0) + ("grad_avg",) * options["centered"]

    @staticmethod
    def from_same_names(saved, own):
        _require(saved, ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"))
        return _with_own(saved, own)

    @staticmethod
    def from_bitsandbytes(saved, own):
        _require(saved, _ADAM)
        saved["alpha"], momentum = _two(saved.pop("betas"))
        if saved["alpha"] == 0 or saved["eps"] == 0:
            raise ValueError(
                "alpha and eps must not be 0 in bitsandbytes' RMSprop, "
                f"got {saved['alpha']} and {saved['eps']}: this is no state of RMSprop"
            )
        if momentum != 0:
            raise ValueError(f"momentum must be 0, for bitsandbytes' RMSprop never applied it, got {momentum}")
        return _with_own({**saved, "momentum": 0.0, "centered": False}, own)


class Namesake:
    """An optimizer whose state only its namesake in torch.optim saves: with the same options and states."""

    bitsandbytes_states, optional = {}, ()

    def __init__(self, operator):
        keys = dict(zip(operator.state_keys, operator.keeps_scalar, strict=True))
        self.counts = "step" in keys
        self.scalars = tuple(key for key, is_scalar in keys.items() if is_scalar and key != "step")
        self._arrays = tuple(key for key, is_scalar in keys.items() if not is_scalar)
        self._options = tuple(dict.fromkeys(option.group_key for option in operator.options))

    def states(self, options):
        return self._arrays

    def from_same_names(self, saved, own):
        _require(saved, self._options)
        return _with_own(saved, own)

    from_bitsandbytes = from_same_names


def layouts_of(optimizer):
    known = {"AdamW": AdamW, "Adam": Adam, "SGD": Sgd, "RMSprop": RmsProp}  # an AdamW is an Adam too
    for name, layouts in known.items():
        if isinstance(optimizer, getattr(torch.optim, name)):
            return layouts
    ours = [getattr(optim, name) for name in optim.__all__]
    for cls in ours:
        if isinstance(optimizer, (cls, getattr(torch.optim, cls.__name__, cls))):
            return Namesake(cls._operator)
    names = sorted(cls.__name__ for cls in ours)
    raise TypeError(f"optimizer must be an {', '.join(names[:-1])} or {names[-1]}, got {type(optimizer).__name__}")


def is_bitsandbytes(groups, states):
    """True if bitsandbytes saved them, by the names of states or, before the first step, of options."""
    if states:
        return any("state1" in state for state in states.values())
    return all({"betas"} <= group.keys() <= _BITSANDBYTES | _HARMLESS for group in groups)


def _require(saved, needed):
    missing = [name for name in needed if name not in saved]
    if missing:
        raise ValueError(f"param_groups must have {', '.join(missing)}, got {', '.join(map(str, saved))}")


def _with_own(saved, own):
    """A saved group's options, and the optimizer's for what it does not save."""
    unknown = saved.keys() - own.keys() - _HARMLESS
    if unknown:
        raise ValueError(
            f"param_groups must have only options that the optimizer's have, got {listed(unknown)} too: "
            "what saved them may compute something else"
        )
    return {**own, **saved}


def _two(betas):
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    return betas


def listed(names):
    return ", ".join(sorted(map(str, names))) or "nothing"
