"""Optimizer checkpoints of other libraries, in torch's layout."""

import torch

from . import optim

_ADAM = ("lr", "betas", "eps", "weight_decay")
_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides its tensors from FSDP
# Options that no result depends on: how torch computes, names of parameters, what torch's schedulers keep in groups.
_HARMLESS = {"capturable", "differentiable", "foreach", "fused", "params", "param_names"}
_HARMLESS |= {"base_momentum", "initial_lr", "max_lr", "max_momentum", "min_lr", "swa_lr"}
_BITSANDBYTES = {*_ADAM, "alpha", "t_alpha", "t_beta3"}  # the last three are of AdEMAMix


def convert_state_dict(state_dict, optimizer):
    r"""An optimizer's state dict as apex, bitsandbytes or DeepSpeed writes it, in the layout of ``torch.optim``.

        optimizer.load_state_dict(fastopt.convert_state_dict(torch.load(path), optimizer))

    The layouts, recognised by their keys; a dict of the optimizer's namesake in torch is taken too::

                               state of a parameter                    count of steps    hyper-parameters
        torch Adam             exp_avg, exp_avg_sq                     state, tensor     own names, amsgrad
        apex FusedAdam         exp_avg, exp_avg_sq                     group             own names, bias_correction
        DeepSpeedCPUAdam       exp_avg, exp_avg_sq                     state, int        own names, bias_correction
        DeepSpeed FusedAdam    exp_avg, exp_avg_sq                     one of a group's  own names, bias_correction
        apex FusedSGD          momentum_buffer                         none              own names
        bitsandbytes Adam(W)   state1 = exp_avg, state2 = exp_avg_sq   state, int        own names
        bitsandbytes RMSprop   state1 = square_avg                     state, int        betas = (alpha, momentum)
        bitsandbytes SGD       state1 = momentum_buffer                state, int        betas = (momentum, dampening)

    Many optimizers save the states of an Adam (RAdam, LAMB, AdamP), so one is known by its options: ``amsgrad`` or
    ``bias_correction``, or bitsandbytes' states. Options that the optimizer's own groups lack are refused, except those
    of the layouts above, those of how torch computes (``foreach``, ``fused``, ``capturable``, ``differentiable``) and
    what torch's schedulers leave (``initial_lr``, ``max_lr``, ...). An algorithm that saves just the options and states
    of one of these, as a subclass of it does, cannot be distinguished from it.

    What the source saves of its groups replaces the optimizer's own, as in ``load_state_dict``; what it does not save,
    such as whether apex or DeepSpeed decoupled the decay, is the optimizer's. So an AdamW goes on as an AdamW in an
    ``Adam`` too, for torch saves which it is. Tensors are handed on, not copied; loading rounds them to their
    parameter's dtype, as torch does.

    Args:
        state_dict: what the library's ``state_dict()`` returned.
        optimizer: an optimizer of fastopt or a namesake in ``torch.optim``, made for the same parameters in the same
            groups; not changed.

    Returns:
        A state dict for ``optimizer.load_state_dict``.

    Raises:
        TypeError: the optimizer is of another class, or the state dict is none.
        ValueError: groups, shapes or the kind of optimizer do not match; a state or option is missing or unknown, or a
            state in 8 bits; the source computed what the optimizer does not (no bias correction, clipping, decoupled
            decay in an Adam, decay that is not in an AdamW).

    Source: apex/optimizers/fused_{adam,sgd}.py; bitsandbytes/optim/{optimizer,adam,rmsprop,sgd}.py (0.50);
    deepspeed/ops/adam/{cpu_adam,fused_adam}.py; torch/optim/{adam,sgd,rmsprop}.py (2.13).
    """
    if not (isinstance(state_dict, dict) and {"state", "param_groups"} <= state_dict.keys()):
        raise TypeError("state_dict must be a dict with state and param_groups, as an optimizer's state_dict() returns")
    family = _family(optimizer)
    own_groups = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], own_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"numbers of parameters in the groups must be the optimizer's {sizes[1]}, got {sizes[0]}")

    result = {"state": {}, "param_groups": []}
    saved_states = {key: _unwrapped(state) for key, state in state_dict["state"].items() if state}
    strays = saved_states.keys() - {key for group in state_dict["param_groups"] for key in group["params"]}
    if strays:
        raise ValueError(f"states must belong to parameters in param_groups, those of {_listed(strays)} do not")
    is_bitsandbytes = _is_bitsandbytes(state_dict["param_groups"], saved_states)
    for saved, own, group in zip(state_dict["param_groups"], own_groups, optimizer.param_groups, strict=True):
        to_options = family.from_bitsandbytes if is_bitsandbytes else family.from_same_names
        options = to_options(dict(saved), own)
        keys = dict(zip(own["params"], saved["params"], strict=True))
        states = {index: saved_states[key] for index, key in keys.items() if key in saved_states}
        if family.counts:
            states = _with_steps(states, saved)
        for index, param in zip(own["params"], group["params"], strict=True):
            if index in states:
                renamed = {family.bitsandbytes_states.get(key, key): value for key, value in states[index].items()}
                result["state"][index] = _checked(index, param, renamed, family.states(options), family)
        result["param_groups"].append({**options, "params": own["params"]})
    return result


class _Adam:
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


class _AdamW(_Adam):
    @staticmethod
    def from_same_names(saved, own):
        options = _Adam.from_same_names(saved, own)
        # torch.optim.AdamW decouples the decay whatever it loads.
        if options["weight_decay"] != 0 and not options["decoupled_weight_decay"]:
            raise ValueError(
                "optimizer must not decouple weight decay (Adam), as what saved the state did not, "
                f"or weight_decay be 0, got {options['weight_decay']}"
            )
        return options


class _Sgd:
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


class _RmsProp:
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


class _Namesake:
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


def _family(optimizer):
    families = {"AdamW": _AdamW, "Adam": _Adam, "SGD": _Sgd, "RMSprop": _RmsProp}  # an AdamW is an Adam too
    for name, family in families.items():
        if isinstance(optimizer, getattr(torch.optim, name)):
            return family
    ours = [getattr(optim, name) for name in optim.__all__]
    for cls in ours:
        if isinstance(optimizer, (cls, getattr(torch.optim, cls.__name__, cls))):
            return _Namesake(cls._operator)
    names = sorted(cls.__name__ for cls in ours)
    raise TypeError(f"optimizer must be an {', '.join(names[:-1])} or {names[-1]}, got {type(optimizer).__name__}")


def _is_bitsandbytes(groups, states):
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
            f"param_groups must have only options that the optimizer's have, got {_listed(unknown)} too: "
            "what saved them may compute something else"
        )
    return {**own, **saved}


def _two(betas):
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    return betas


def _unwrapped(state):
    return {**{key: value for key, value in state.items() if key != _WRAPPED}, **state.get(_WRAPPED, {})}


def _with_steps(states, saved):
    """The states with a count each, in torch's form."""
    counts = {index: _as_count(state["step"]) for index, state in states.items() if "step" in state}
    of_group = _as_count(saved["step"]) if "step" in saved else None
    if counts and of_group is not None:
        # DeepSpeed's FusedAdam counts on the last parameter for all of them; the others stay at the group's number.
        moved = set(counts.values()) - {of_group} or {of_group}
        if len(moved) > 1:
            raise ValueError(f"step must be one number for a group that counts together, got {sorted(moved)}")
        counts = dict.fromkeys(states, moved.pop())
    elif of_group is not None:
        counts = dict.fromkeys(states, of_group)
    missing = [index for index in states if index not in counts]
    if missing:
        raise ValueError(f"step must be in the state of each parameter or in its group, it is not for {missing}")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return {
        index: {
            **state,
            "step": state["step"]
            if of_group is None and isinstance(state["step"], torch.Tensor)
            else torch.tensor(counts[index], dtype=dtype),
        }
        for index, state in states.items()
    }


def _as_count(value):
    is_number = isinstance(value, (int, float)) or isinstance(value, torch.Tensor) and value.numel() == 1
    count = float(value) if is_number else -1.0
    if not (count >= 0 and count.is_integer()):
        raise ValueError(f"step must be a whole number >= 0, got {value!r}")
    return count


def _checked(index, param, state, needed, family):
    """The needed states of one parameter and its count, after a look at each."""
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and not (tensor.is_floating_point() or key == "step"):
            raise ValueError(f"{key} of parameter {index} must be in floating point, got {tensor.dtype}: quantised")
    unknown = state.keys() - {"step", *family.scalars, *needed, *family.bitsandbytes_states.values(), *family.optional}
    if unknown:
        raise ValueError(f"states of parameter {index} must be among {_listed(needed)}, got {_listed(unknown)} too")
    missing = [key for key in (*family.scalars, *needed) if not isinstance(state.get(key), torch.Tensor)]
    # SGD makes a buffer with the first gradient.
    if missing and not (family is _Sgd and state.get("momentum_buffer") is None):
        raise ValueError(f"states of parameter {index} must have {_listed(missing)}, got {_listed(state)}")
    for key in needed:
        if state.get(key) is not None and state[key].shape != param.shape:
            raise ValueError(
                f"{key} of parameter {index} must have its shape {tuple(param.shape)}, got {tuple(state[key].shape)}"
            )
    kept = ("step",) * family.counts + family.scalars + needed
    return {key: state[key] for key in kept if state.get(key) is not None}


def _listed(names):
    return ", ".join(sorted(map(str, names))) or "nothing"
