"""Optimizer checkpoints of other libraries, in torch's layout."""

import torch

from ._checkpoint_layouts import Sgd, is_bitsandbytes, layouts_of, listed

_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides its tensors from FSDP


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
    layouts = layouts_of(optimizer)
    own_groups = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], own_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"numbers of parameters in the groups must be the optimizer's {sizes[1]}, got {sizes[0]}")

    result = {"state": {}, "param_groups": []}
    saved_states = {key: _unwrapped(state) for key, state in state_dict["state"].items() if state}
    strays = saved_states.keys() - {key for group in state_dict["param_groups"] for key in group["params"]}
    if strays:
        raise ValueError(f"states must belong to parameters in param_groups, those of {listed(strays)} do not")
    to_options = layouts.from_same_names
    if is_bitsandbytes(state_dict["param_groups"], saved_states):
        to_options = layouts.from_bitsandbytes
    for saved, own, group in zip(state_dict["param_groups"], own_groups, optimizer.param_groups, strict=True):
        options = to_options(dict(saved), own)
        keys = dict(zip(own["params"], saved["params"], strict=True))
        states = {index: saved_states[key] for index, key in keys.items() if key in saved_states}
        if layouts.counts:
            states = _with_steps(states, saved)
        for index, param in zip(own["params"], group["params"], strict=True):
            if index in states:
                renamed = {layouts.bitsandbytes_states.get(key, key): value for key, value in states[index].items()}
                result["state"][index] = _checked(index, param, renamed, layouts.states(options), layouts)
        result["param_groups"].append({**options, "params": own["params"]})
    return result


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


def _checked(index, param, state, needed, layouts):
    """The needed states of one parameter and its count, after a look at each."""
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and not (tensor.is_floating_point() or key == "step"):
            raise ValueError(f"{key} of parameter {index} must be in floating point, got {tensor.dtype}: quantised")
    known = {"step", *layouts.scalars, *needed, *layouts.bitsandbytes_states.values(), *layouts.optional}
    unknown = state.keys() - known
    if unknown:
        raise ValueError(f"states of parameter {index} must be among {listed(needed)}, got {listed(unknown)} too")
    missing = [key for key in (*layouts.scalars, *needed) if not isinstance(state.get(key), torch.Tensor)]
    # SGD makes a buffer with the first gradient.
    if missing and not (layouts is Sgd and state.get("momentum_buffer") is None):
        raise ValueError(f"states of parameter {index} must have {listed(missing)}, got {listed(state)}")
    for key in needed:
        if state.get(key) is not None and state[key].shape != param.shape:
            raise ValueError(
                f"{key} of parameter {index} must have its shape {tuple(param.shape)}, got {tuple(state[key].shape)}"
            )
    kept = ("step",) * layouts.counts + layouts.scalars + needed
    return {key: state[key] for key in kept if state.get(key) is not None}
