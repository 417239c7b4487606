"""State dicts of optimizers that compute something else, which convert_state_dict must not take for its own."""

import copy

import pytest
import torch

import fastopt
from common import error
from optim_cases import make_params, set_grads
from optimizers import NAMES, OPTIMIZERS, WITH_STATES

SHAPES = [(7, 3), (5, 4), (3, 2)]
IN_TORCH = [row.name for row in OPTIMIZERS if row.is_in_torch]
SAME = {(row.name, other.name) for row in OPTIMIZERS for other in OPTIMIZERS if row.operator == other.operator}
TORCH = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)


def trained(name, n_steps, **options):
    """The parameters of an optimizer of torch.optim after some steps, and the optimizer."""
    params = make_params(SHAPES)
    optimizer = getattr(torch.optim, name)(params, lr=0.01, **WITH_STATES.get(name, {}), **options)
    for step in range(n_steps):
        set_grads(params, seed=step)
        if name == "SparseAdam":
            for p in params:
                p.grad = p.grad.to_sparse()
        optimizer.step(*[lambda: torch.tensor(1.0)] * (name == "LBFGS"))
    return params, optimizer


def test_torch_has_the_optimizers_of_these_tests():
    assert {"Adafactor", "Adamax", "LBFGS", "NAdam", "RAdam", "SparseAdam", *IN_TORCH} <= set(TORCH)


@pytest.mark.parametrize("n_steps", [0, 2])
@pytest.mark.parametrize("name", TORCH)
def test_each_optimizer_of_torch_continues_as_itself_or_is_refused(name, n_steps):
    params, optimizer = trained(name, n_steps)
    for ours in NAMES:
        continued = getattr(fastopt, ours)(params, lr=0.5)
        if (name, ours) in SAME:
            assert fastopt.convert_state_dict(optimizer.state_dict(), continued)["param_groups"][0]["lr"] == 0.01
            continue
        with pytest.raises(ValueError, match="param_groups must have .*, got "):
            fastopt.convert_state_dict(optimizer.state_dict(), continued)


# The class that ran, its decay, and the class that continues it: the group says whether the decay is decoupled.
CONTINUED = [("Adam", 0.0, "AdamW"), ("AdamW", 0.0, "Adam"), ("AdamW", 0.1, "Adam")]


@pytest.mark.parametrize("module", [fastopt, torch.optim], ids=["fastopt", "torch"])
@pytest.mark.parametrize(("name", "weight_decay", "into"), CONTINUED)
def test_adam_and_adamw_continue_each_other_as_what_they_were(module, name, weight_decay, into):
    params, uninterrupted = trained(name, 2, weight_decay=weight_decay)
    saved, params_then = copy.deepcopy((uninterrupted.state_dict(), params))
    optimizer = getattr(module, into)(params_then, lr=0.5, weight_decay=0.7)
    optimizer.load_state_dict(fastopt.convert_state_dict(saved, optimizer))
    for step in range(2, 5):
        for each, stepped in ((params, uninterrupted), (params_then, optimizer)):
            set_grads(each, seed=step)
            stepped.step()
    for p, q in zip(params_then, params, strict=True):
        assert error(p, q) <= (0 if module is torch.optim else 2e-6)


@pytest.mark.parametrize("module", [fastopt, torch.optim], ids=["fastopt", "torch"])
def test_decay_of_an_adam_is_refused_by_an_adamw_which_torch_makes_decouple_it(module):
    params, uninterrupted = trained("Adam", 2, weight_decay=0.1)
    with pytest.raises(ValueError, match="optimizer must not decouple weight decay .* got 0.1"):
        fastopt.convert_state_dict(uninterrupted.state_dict(), module.AdamW(params))
    loaded = module.AdamW(params)
    loaded.load_state_dict(uninterrupted.state_dict())
    assert loaded.param_groups[0]["decoupled_weight_decay"] is True
    flagged = module.Adam(params, decoupled_weight_decay=True)
    flagged.load_state_dict(fastopt.convert_state_dict(uninterrupted.state_dict(), flagged))
    assert flagged.param_groups[0]["decoupled_weight_decay"] is False


ADAM = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
SGD = dict(lr=0.01, momentum=0.9, dampening=0.0, weight_decay=0.1, nesterov=False)
RMSPROP = dict(lr=0.01, alpha=0.9, eps=1e-8, weight_decay=0.1, momentum=0.9, centered=False)
ADAM_STATES, SGD_STATES, RMSPROP_STATES = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",), ("square_avg",)
KIND = "param_groups must have amsgrad or bias_correction, .* got lr"
# Source of the state dict, its options, its states, the optimizer that must refuse it, and the message.
FOREIGN = [
    (
        "apex FusedLAMB",
        dict(ADAM, bias_correction=True, grad_averaging=True, max_grad_norm=1.0, step=2),
        ADAM_STATES,
        "Adam",
        "got grad_averaging, max_grad_norm too",
    ),
    (
        "apex FusedNovoGrad",
        dict(ADAM, bias_correction=True, grad_averaging=True, norm_type=2, init_zero=False, step=2),
        ADAM_STATES,
        "Adam",
        "got grad_averaging, init_zero, norm_type too",
    ),
    (
        "deepspeed FusedLamb",
        dict(ADAM, bias_correction=True, max_grad_norm=0.0, max_coeff=10.0, min_coeff=0.01),
        ADAM_STATES,
        "Adam",
        "got max_coeff, max_grad_norm, min_coeff too",
    ),
    (
        "timm Lamb",
        dict(
            ADAM,
            bias_correction=True,
            grad_averaging=True,
            max_grad_norm=1.0,
            trust_clip=False,
            always_adapt=False,
            step=2,
        ),
        ADAM_STATES,
        "AdamW",
        "got always_adapt, grad_averaging, max_grad_norm, trust_clip too",
    ),
    ("torch_optimizer Lamb", ADAM, ADAM_STATES, "Adam", KIND),
    ("torch_optimizer RAdam", dict(ADAM, buffer=[]), ADAM_STATES, "Adam", "got buffer too"),
    (
        "timm NAdamW",
        dict(ADAM, foreach=None, maximize=False, capturable=False, caution=False, corrected_weight_decay=False),
        ADAM_STATES,
        "AdamW",
        "got caution, corrected_weight_decay too",
    ),
    ("transformers AdamW", dict(ADAM, correct_bias=True), ADAM_STATES, "AdamW", "got correct_bias too"),
    (
        "adamp AdamP",
        dict(ADAM, delta=0.1, wd_ratio=0.1, nesterov=False),
        ADAM_STATES,
        "AdamW",
        "got delta, nesterov, wd_ratio too",
    ),
    ("AdaBound", dict(ADAM, final_lr=0.1, gamma=1e-3, amsbound=False), ADAM_STATES, "Adam", "got amsbound, final_lr"),
    (
        "schedulefree AdamWScheduleFree",
        dict(ADAM, r=0.0, k=2, warmup_steps=0, train_mode=True, weight_sum=0.1, lr_max=0.1, foreach=True),
        ("z", "exp_avg_sq"),
        "AdamW",
        "got k, lr_max, r, train_mode, warmup_steps, weight_sum too",
    ),
    (
        "Lookahead around Adam",
        dict(ADAM, amsgrad=False, lookahead_alpha=0.5, lookahead_k=6, lookahead_step=2),
        ADAM_STATES,
        "Adam",
        "got lookahead_alpha, lookahead_k, lookahead_step too",
    ),
    ("adamp SGDP", dict(SGD, eps=1e-8, delta=0.1, wd_ratio=0.1), SGD_STATES, "SGD", "got delta, eps, wd_ratio too"),
    ("timm SGDW", dict(SGD, caution=False, foreach=None), SGD_STATES, "SGD", "got caution too"),
    ("LARS", dict(SGD, trust_coefficient=0.1, eps=1e-8), SGD_STATES, "SGD", "got eps, trust_coefficient too"),
    ("SAM around SGD", dict(SGD, rho=0.05, adaptive=False), SGD_STATES, "SGD", "got adaptive, rho too"),
    ("SGD of decoupled decay", dict(SGD, decoupled_weight_decay=True), SGD_STATES, "SGD", "got decoupled_weight_decay"),
    (
        "timm RMSpropTF",
        dict(RMSPROP, decoupled_decay=False, lr_in_momentum=True, caution=False),
        (*RMSPROP_STATES, "momentum_buffer"),
        "RMSprop",
        "got caution, decoupled_decay, lr_in_momentum too",
    ),
    ("an Adam whose group is odd", dict(ADAM, amsgrad=False, **{"9": 1}), ADAM_STATES, "Adam", "got 9 too"),
    ("bitsandbytes with more", dict(ADAM, k=1), ("state1", "state2"), "AdamW", "got k too"),
    ("bitsandbytes without", {"lr": 0.1}, ("state1",), "AdamW", "must have betas, eps, weight_decay, got lr"),
    ("bitsandbytes without", {"lr": 0.1}, ("state1",), "SGD", "must have betas, weight_decay, got lr"),
    ("bitsandbytes without", {"lr": 0.1}, ("state1",), "RMSprop", "must have betas, eps, weight_decay, got lr"),
    ("bitsandbytes AdEMAMix", dict(ADAM, betas=(0.9, 0.99, 0.9)), ("state1",), "SGD", "betas must be two numbers"),
    ("bitsandbytes AdEMAMix", dict(ADAM, betas=(0.9, 0.99, 0.9)), ("state1",), "RMSprop", "betas must be two numbers"),
]


def saved(options, states):
    """The state dict of an optimizer with these options and states after two steps."""
    state = {name: torch.ones(3, 2) for name in states}
    return {"state": {0: {"step": 2, **state}}, "param_groups": [{**options, "params": [0]}]}


@pytest.mark.parametrize(
    ("options", "states", "into", "message"), [row[1:] for row in FOREIGN], ids=[row[0] for row in FOREIGN]
)
def test_optimizers_of_other_libraries_that_compute_something_else_are_refused(options, states, into, message):
    optimizer = getattr(fastopt, into)(make_params([(3, 2)]), lr=0.5)
    with pytest.raises(ValueError, match=message):
        fastopt.convert_state_dict(saved(options, states), optimizer)


LEFT_IN_GROUPS = {
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=9, cycle_momentum=optimizer.defaults.keys() & {"betas", "momentum"} != set()
    ),
    "CyclicLR": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=0.1, max_lr=0.2, cycle_momentum=optimizer.defaults.keys() & {"betas", "momentum"} != set()
    ),
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.3),
}


@pytest.mark.parametrize("schedule", LEFT_IN_GROUPS.values(), ids=LEFT_IN_GROUPS)
@pytest.mark.parametrize("name", IN_TORCH)
def test_group_entries_of_schedulers_and_parameter_names_are_kept(name, schedule):
    params = make_params([(3, 2)])
    optimizer = getattr(torch.optim, name)([("weight", params[0])], lr=0.1, **WITH_STATES[name])
    schedule(optimizer)
    group = optimizer.state_dict()["param_groups"][0]
    ours = getattr(fastopt, name)(params, **WITH_STATES[name])
    found = fastopt.convert_state_dict(optimizer.state_dict(), ours)
    assert found["param_groups"] == [group]
    assert group.keys() >= {"param_names"}


def test_extra_group_options_pass_where_the_optimizer_has_them_too():
    params = make_params([(3, 2)])
    state_dict = torch.optim.Adam([{"params": params, "layer": 3}]).state_dict()
    with pytest.raises(ValueError, match="param_groups must have .* got layer too"):
        fastopt.convert_state_dict(state_dict, fastopt.Adam(params))
    optimizer = fastopt.Adam([{"params": params, "layer": 1}])
    assert fastopt.convert_state_dict(state_dict, optimizer)["param_groups"][0]["layer"] == 3


def test_implementation_flags_of_torch_are_accepted_by_every_optimizer():
    """A torch may have fused RMSprop, or a capturable SGD, before the optimizer that continues has the option."""
    for name, options in (("SGD", SGD), ("RMSprop", RMSPROP), ("Adam", dict(ADAM, amsgrad=False))):
        how = dict(foreach=None, fused=None, capturable=False, differentiable=False, maximize=False)
        state_dict = {"state": {}, "param_groups": [{**options, **how, "params": [0]}]}
        optimizer = getattr(fastopt, name)(make_params([(3, 2)]))
        assert fastopt.convert_state_dict(state_dict, optimizer)["param_groups"][0].items() >= how.items()


@pytest.mark.parametrize(
    ("into", "options", "expected"),
    [
        ("AdamW", ADAM, ADAM),
        ("AdamW", dict(ADAM, alpha=0.0, t_alpha=None, t_beta3=None), ADAM),
        ("SGD", dict(ADAM, eps=0.0, betas=(0.9, 0.0)), dict(lr=0.01, momentum=0.9, dampening=0.0, weight_decay=0.1)),
        ("RMSprop", dict(ADAM, betas=(0.8, 0.0)), dict(lr=0.01, alpha=0.8, eps=1e-8, momentum=0.0)),
    ],
)
def test_bitsandbytes_before_its_first_step_is_recognized_by_its_options(into, options, expected):
    optimizer = getattr(fastopt, into)(make_params([(3, 2)]), lr=0.5)
    found = fastopt.convert_state_dict(
        {"state": {}, "param_groups": [{**options, "initial_lr": 0.02, "params": [0]}]}, optimizer
    )
    (group,) = found["param_groups"]
    assert group.items() >= {**expected, "initial_lr": 0.02}.items()
    assert group.keys() - {"initial_lr"} == optimizer.param_groups[0].keys()
