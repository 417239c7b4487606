"""Checkpoints of apex, bitsandbytes and DeepSpeed, written by hand as those libraries write them, and continued."""

import copy

import pytest
import torch

import fastopt
from common import error
from optim_cases import make_params, take_steps

SHAPES = [(7,), (5, 4), (3,)]
WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes 0.50 optim/optimizer.py, Optimizer8bit.state_dict

# Each turns the state dict of a torch optimizer into what the library would have saved after the same steps.


def rewrite(state_dict, state, group):
    return {
        "state": {key: state(dict(value)) for key, value in state_dict["state"].items()},
        "param_groups": [group(dict(value)) for value in state_dict["param_groups"]],
    }


def pick(values, *names, **more):
    return {**{name: values[name] for name in (*names, "params") if name in values}, **more}


def apex_adam(state_dict):
    """apex/optimizers/fused_adam.py: __init__ (defaults), step ("assume same step across group now")."""
    step = int(state_dict["state"][0]["step"])
    return rewrite(
        state_dict,
        lambda s: pick(s, "exp_avg", "exp_avg_sq"),
        lambda g: pick(g, "lr", "betas", "eps", "weight_decay", bias_correction=True, step=step),
    )


def apex_adam_capturable(state_dict):
    """The same: with capturable=True, lr and step are tensors."""
    result = apex_adam(state_dict)
    for group in result["param_groups"]:
        group["step"] = torch.tensor([group["step"]], dtype=torch.int)
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    return result


def apex_sgd(state_dict):
    """apex/optimizers/fused_sgd.py: __init__ (defaults), get_momentums."""
    options = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    return rewrite(state_dict, lambda s: s, lambda g: pick(g, *options))


def apex_sgd_without_momentum(state_dict):
    """The same: the buffer is made, of zeros, and never used."""
    result = apex_sgd(state_dict)
    zeros = {i: {"momentum_buffer": torch.zeros(shape)} for i, shape in enumerate(SHAPES)}
    return {**result, "state": zeros}


def deepspeed_cpu_adam(state_dict):
    """deepspeed/ops/adam/cpu_adam.py: __init__ (default_args), step (state initialization)."""
    return rewrite(
        state_dict,
        lambda s: {"step": int(s["step"]), **pick(s, "exp_avg", "exp_avg_sq")},
        lambda g: pick(g, "lr", "betas", "eps", "weight_decay", bias_correction=True, amsgrad=False),
    )


def deepspeed_fused_adam(state_dict):
    """deepspeed/ops/adam/fused_adam.py: the group's step stays 0, the last parameter's counts for all."""
    result = deepspeed_cpu_adam(state_dict)
    for group in result["param_groups"]:
        group["step"] = 0
        for key in group["params"][:-1]:
            result["state"][key]["step"] = 0
    return result


def bitsandbytes_state(names):
    """bitsandbytes/optim/optimizer.py: init_state of Optimizer2State and Optimizer1State, state_dict."""
    return lambda s: {"step": int(s.get("step", 4)), WRAPPED: {f"state{i + 1}": s[n] for i, n in enumerate(names)}}


def bitsandbytes_adam(state_dict):
    """bitsandbytes/optim/{adam,adamw,optimizer}.py: defaults of Optimizer2State, with what is for AdEMAMix."""
    return rewrite(
        state_dict,
        bitsandbytes_state(["exp_avg", "exp_avg_sq"]),
        lambda g: pick(g, "lr", "betas", "eps", "weight_decay", alpha=0.0, t_alpha=None, t_beta3=None),
    )


def bitsandbytes_adam_unwrapped(state_dict):
    """bitsandbytes before 0.50: nothing is wrapped, the group has four options."""
    result = bitsandbytes_adam(state_dict)
    return rewrite(
        result,
        lambda s: {"step": s["step"], **s[WRAPPED]},
        lambda g: pick(g, "lr", "betas", "eps", "weight_decay"),
    )


def bitsandbytes_rmsprop(state_dict):
    """bitsandbytes/optim/rmsprop.py: __init__ (betas are alpha and momentum)."""
    group = lambda g: pick(g, "lr", "eps", "weight_decay", betas=(g["alpha"], g["momentum"]))  # noqa: E731
    return rewrite(state_dict, bitsandbytes_state(["square_avg"]), group)


def bitsandbytes_sgd(state_dict):
    """bitsandbytes/optim/sgd.py: __init__ (betas are momentum and dampening)."""
    group = lambda g: pick(g, "lr", "weight_decay", eps=0.0, betas=(g["momentum"], g["dampening"]))  # noqa: E731
    return rewrite(state_dict, bitsandbytes_state(["momentum_buffer"]), group)


def torch_itself(state_dict):
    return state_dict


# The source's layout, the optimizer that continues, its options, and options that the saved ones must replace.
SOURCES = [
    (apex_adam, "Adam", dict(lr=3e-3, betas=(0.8, 0.9), weight_decay=0.1), dict(lr=1.0, betas=(0.1, 0.1))),
    (apex_adam, "AdamW", dict(lr=3e-3, eps=1e-4, weight_decay=0.1), dict(lr=1.0, weight_decay=0.5)),
    (apex_adam_capturable, "AdamW", dict(lr=3e-3, weight_decay=0.1), {}),
    (apex_sgd, "SGD", dict(lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True), dict(lr=1.0)),
    (apex_sgd, "SGD", dict(lr=0.02, momentum=0.9, dampening=0.5), dict(lr=1.0, momentum=0.3)),
    (apex_sgd_without_momentum, "SGD", dict(lr=0.02, weight_decay=0.1), dict(lr=1.0)),
    (deepspeed_cpu_adam, "AdamW", dict(lr=3e-3, weight_decay=0.1), dict(lr=1.0)),
    (deepspeed_cpu_adam, "Adam", dict(lr=3e-3, weight_decay=0.1), dict(lr=1.0)),
    (deepspeed_fused_adam, "AdamW", dict(lr=3e-3, weight_decay=0.1), dict(lr=1.0)),
    (bitsandbytes_adam, "AdamW", dict(lr=3e-3, betas=(0.8, 0.9), weight_decay=0.1), dict(lr=1.0)),
    (bitsandbytes_adam, "Adam", dict(lr=3e-3), dict(lr=1.0)),
    (bitsandbytes_adam_unwrapped, "AdamW", dict(lr=3e-3), {}),
    (bitsandbytes_rmsprop, "RMSprop", dict(lr=3e-3, alpha=0.9, weight_decay=0.1), dict(lr=1.0, alpha=0.5)),
    (bitsandbytes_sgd, "SGD", dict(lr=0.02, momentum=0.9, weight_decay=0.1), dict(lr=1.0, momentum=0.1)),
    (torch_itself, "Adam", dict(lr=3e-3, amsgrad=True), {}),
    (torch_itself, "RMSprop", dict(lr=3e-3, momentum=0.9, centered=True), {}),
    (torch_itself, "SGD", dict(lr=3e-3, momentum=0.9), {}),
]
sources = pytest.mark.parametrize(
    ("write", "name", "options", "others"), SOURCES, ids=lambda v: getattr(v, "__name__", "")
)


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:]}]


def checkpoint(name="Adam", **options):
    """A state dict of torch's optimizer after four steps, the parameters then, and those three steps later."""
    params = make_params(SHAPES)
    optimizer = getattr(torch.optim, name)(groups(params), **options)
    take_steps(params, optimizer, 0, 4)
    return copy.deepcopy((optimizer.state_dict(), params)), (params, optimizer)


@sources
@pytest.mark.parametrize("module", [fastopt, torch.optim], ids=["fastopt", "torch"])
def test_a_run_continued_from_a_foreign_checkpoint_equals_an_uninterrupted_one(module, write, name, options, others):
    (state_dict, params), (whole, uninterrupted) = checkpoint(name, **options)
    take_steps(whole, uninterrupted, 4, 7)
    foreign = write(state_dict)
    before = copy.deepcopy(foreign)
    optimizer = getattr(module, name)(groups(params), **{**options, **others})
    optimizer.load_state_dict(fastopt.convert_state_dict(foreign, optimizer))
    take_steps(params, optimizer, 4, 7)
    for p, q in zip(params, whole, strict=True):
        assert error(p, q) <= (0 if module is torch.optim else 2e-6)
    # In torch's form to the last key; the foreign dict is as it was.
    mine, yours = optimizer.state_dict(), uninterrupted.state_dict()
    for state, other in zip(mine["state"].values(), yours["state"].values(), strict=False):
        assert {k: (v.dtype, v.shape) for k, v in state.items()} == {k: (v.dtype, v.shape) for k, v in other.items()}
        assert state.get("step", 0) == other.get("step", 0)
    for group, other in zip(mine["param_groups"], yours["param_groups"], strict=True):
        assert group == other
    assert before["param_groups"] == foreign["param_groups"]
    assert before["state"].keys() == foreign["state"].keys()


def test_a_checkpoint_before_the_first_step_has_no_state():
    params = make_params(SHAPES)
    empty = torch.optim.Adam(groups(params), lr=0.5).state_dict()
    foreign = {**empty, "param_groups": [pick(g, "lr", "betas", "eps", "weight_decay") for g in empty["param_groups"]]}
    optimizer = fastopt.Adam(groups(params))
    converted = fastopt.convert_state_dict(foreign, optimizer)
    assert converted["state"] == {}
    assert converted["param_groups"][0]["lr"] == 0.5


def with_state(index, **values):
    def change(foreign):
        state = foreign["state"][index]
        inner = state.get(WRAPPED, {})
        for key, value in values.items():
            holder = inner if key in inner else state
            holder.pop(key, None)
            if value is not None:
                holder[key] = value

    return change


def with_group(**values):
    return lambda foreign: foreign["param_groups"][0].update(values)


def without_group_key(key):
    return lambda foreign: foreign["param_groups"][0].pop(key)


EIGHT_BITS = {
    "state1": torch.zeros(5, 4, dtype=torch.uint8),
    "state2": torch.zeros(5, 4, dtype=torch.uint8),
    "qmap1": torch.zeros(256),
}
REFUSED = [
    (apex_adam, "Adam", with_group(bias_correction=False), "bias_correction must be True, .* got False"),
    (apex_adam, "Adam", without_group_key("step"), r"step must be in .* not for \[0, 1\]"),
    (apex_adam, "Adam", with_group(step=-1), "step must be a whole number >= 0, got -1"),
    (apex_adam, "Adam", with_group(step="4"), "step must be a whole number >= 0, got '4'"),
    (apex_adam, "Adam", without_group_key("betas"), "param_groups must have betas, got lr"),
    (apex_adam, "Adam", with_state(1, exp_avg=None), "parameter 1 must have exp_avg, got exp_avg_sq"),
    (apex_adam, "Adam", with_state(1, exp_avg=3.0), "parameter 1 must have exp_avg,"),
    (apex_adam, "Adam", with_state(1, exp_avg=torch.zeros(20)), r"shape \(5, 4\), got \(20,\)"),
    (apex_adam, "Adam", with_state(1, master_param=torch.zeros(5, 4)), "got master_param too"),
    (apex_adam, "Adam", with_group(params=[0]), r"must be the optimizer's \[2, 1\], got \[1, 1\]"),
    (apex_adam, "Adam", with_group(params=[0, 9]), "those of 1 do not"),
    (apex_adam, "SGD", lambda foreign: None, "param_groups must have momentum, dampening, nesterov, got lr"),
    (apex_sgd, "Adam", lambda foreign: None, "param_groups must have betas, eps, got lr"),
    (deepspeed_cpu_adam, "Adam", with_group(bias_correction=0), "bias_correction must be True"),
    (deepspeed_cpu_adam, "Adam", with_group(amsgrad=True), "parameter 0 must have max_exp_avg_sq, got exp_avg,"),
    (deepspeed_cpu_adam, "Adam", with_state(0, step=None), r"it is not for \[0\]"),
    (deepspeed_fused_adam, "Adam", with_state(0, step=3), r"step must be one number .* got \[3.0, 4.0\]"),
    (bitsandbytes_adam, "AdamW", with_state(1, **EIGHT_BITS), "parameter 1 must be in floating point, got torch.uint8"),
    (bitsandbytes_adam, "AdamW", with_state(1, state2=None), "parameter 1 must have exp_avg_sq, got exp_avg, step"),
    (bitsandbytes_adam, "AdamW", with_state(0, unorm_vec=torch.zeros(1)), "got unorm_vec too"),
    (bitsandbytes_adam, "AdamW", with_state(0, gnorm_vec=torch.zeros(100)), "got gnorm_vec too"),
    (bitsandbytes_adam, "AdamW", with_group(alpha=5.0), "this is no state of Adam"),
    (bitsandbytes_adam, "AdamW", with_group(betas=(0.9, 0.99, 0.999)), "betas must be two numbers"),
    (bitsandbytes_adam, "Adam", with_group(weight_decay=0.1), "optimizer must decouple weight decay .* got 0.1"),
    (bitsandbytes_adam, "SGD", lambda foreign: None, "eps must be 0 in bitsandbytes' SGD, got 1e-08"),
    (bitsandbytes_rmsprop, "RMSprop", with_group(betas=(0.99, 0.9)), "momentum must be 0, .* got 0.9"),
    (bitsandbytes_rmsprop, "RMSprop", with_group(betas=(0.0, 0.0)), "alpha and eps must not be 0 .* got 0.0"),
    (bitsandbytes_rmsprop, "SGD", lambda foreign: None, "eps must be 0 in bitsandbytes' SGD"),
    (bitsandbytes_rmsprop, "AdamW", lambda foreign: None, "parameter 0 must have exp_avg_sq"),
    (bitsandbytes_sgd, "SGD", with_group(betas=(0.9, 0.99)), "dampening must be 0, .* got 0.99"),
    (bitsandbytes_sgd, "RMSprop", lambda foreign: None, "alpha and eps must not be 0 .* no state of RMSprop"),
    (torch_itself, "Adam", with_state(0, extra=torch.zeros(7)), "got extra too"),
]
OF_SOURCE = {"adam": "Adam", "sgd": "SGD", "rmsprop": "RMSprop", "itself": "Adam"}


@pytest.mark.parametrize(
    ("write", "name", "change", "message"), REFUSED, ids=[f"{row[0].__name__}-{row[1]}-{row[3]}" for row in REFUSED]
)
def test_foreign_state_that_cannot_be_continued_is_refused_by_name(write, name, change, message):
    source = next(OF_SOURCE[part] for part in reversed(write.__name__.split("_")) if part in OF_SOURCE)
    (state_dict, params), _ = checkpoint(source, lr=0.01, **({"momentum": 0.9} if source == "SGD" else {}))
    foreign = write(state_dict)
    change(foreign)
    optimizer = getattr(fastopt, name)(groups(params), lr=0.5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        fastopt.convert_state_dict(foreign, optimizer)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("bad", [None, {}, {"state": {}}, [1], {"param_groups": []}], ids=str)
def test_argument_that_is_no_state_dict_is_a_type_error(bad):
    with pytest.raises(TypeError, match="state_dict must be a dict with state and param_groups"):
        fastopt.convert_state_dict(bad, fastopt.SGD(make_params(SHAPES)))


def test_another_optimizer_is_a_type_error():
    optimizer = torch.optim.Rprop(make_params(SHAPES))
    with pytest.raises(TypeError, match="optimizer must be an Adadelta, .* or SGD, got Rprop"):
        fastopt.convert_state_dict(optimizer.state_dict(), optimizer)
