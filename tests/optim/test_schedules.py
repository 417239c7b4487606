"""Everything that steers optimizers from outside: every schedule of torch, averaged models, one scaler for several."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import fastopt
from optim_helpers import assert_same, seen, step_through
from optimizers import IN_TORCH, OURS, THEIRS

# Makers of schedules by name; each name in torch's list has one.
SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=has_momentum(o)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=has_momentum(o)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=2.0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.02, anneal_epochs=4),
}
configurations = pytest.mark.parametrize(("name", "options"), IN_TORCH, ids=str)


def has_momentum(optimizer):
    """True if a schedule can change the momentum, or beta1, between the steps."""
    group = optimizer.param_groups[0]
    return "betas" in group or group.get("momentum", 0) > 0


def test_every_schedule_of_torch_is_in_the_table():
    assert set(SCHEDULES) == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


@pytest.mark.parametrize("has_tensor_lr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@configurations
def test_a_schedule_moves_the_options_as_with_torch_and_none_warns(name, options, schedule, has_tensor_lr):
    def train(cls):
        params = [torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]
        groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}]
        lr = torch.tensor(options["lr"], dtype=torch.float64) if has_tensor_lr else options["lr"]
        optimizer = cls(groups, **{**options, "lr": lr})
        scheduler = SCHEDULES[schedule](optimizer)
        log = []
        for step in range(8):
            step_through(optimizer, params, 1, first=step)
            scheduler.step(*([1.0 + (step > 2)] if schedule == "ReduceLROnPlateau" else []))
            log.append([float(lr) for lr in scheduler.get_last_lr()])
            if step == 4:  # a checkpoint of both, into new ones
                saved, saved_optimizer = scheduler.state_dict(), optimizer.state_dict()
                optimizer = cls(groups, **{**options, "lr": lr})
                scheduler = SCHEDULES[schedule](optimizer)
                optimizer.load_state_dict(saved_optimizer)
                scheduler.load_state_dict(saved)
        return log, seen(params, optimizer)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own: a new schedule steps once before its optimizer does.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        warnings.filterwarnings("ignore", "To get the last learning rate")
        expected = train(getattr(THEIRS, name))
        assert_same(train(getattr(OURS, name)), expected)


def test_schedule_detects_whether_its_optimizer_has_stepped():
    param = torch.ones(2, requires_grad=True)
    for has_stepped in (False, True):
        optimizer = fastopt.SGD([param], lr=0.1)
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        if has_stepped:
            optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        assert bool(caught) is not has_stepped


AVERAGES = [
    {},
    {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
]


@configurations
def test_averaged_models_follow_a_model_that_is_trained(name, options):
    def train(cls, average):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).double()
        optimizer = cls(model.parameters(), **options)
        averaged = swa_utils.AveragedModel(model, **average)
        x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            averaged.update_parameters(model)
        swa_utils.update_bn([x, 2 * x], averaged)
        return {key: value.clone() for key, value in averaged.state_dict().items()}

    for average in AVERAGES:
        assert_same(train(getattr(OURS, name), average), train(getattr(THEIRS, name), average))


@pytest.mark.parametrize("overflow_at", [(0,), (1,), (3,), (0, 1), ()], ids=str)
@pytest.mark.parametrize("unscales", [False, True])
def test_one_scaler_serves_several_optimizers_and_a_skipped_step_makes_nothing(overflow_at, unscales):
    def train(module):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 4) for _ in IN_TORCH]
        optimizers = [
            getattr(module, name)(layer.parameters(), **options)
            for layer, (name, options) in zip(layers, IN_TORCH, strict=True)
        ]
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        log = []
        for step in range(5):
            x = torch.ones(2, 4)
            losses = []
            for i, layer in enumerate(layers):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = layer(x).tanh()
                # One optimizer's gradients overflow; the others' do not.
                overflows = step in overflow_at and i == step % len(layers)
                losses.append(x.float().mean() * (float("inf") if overflows else 1.0))
                x = x.detach().float()
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale(sum(losses)).backward()
            before = [len(optimizer.state) for optimizer in optimizers]
            for i, (optimizer, layer) in enumerate(zip(optimizers, layers, strict=True)):
                if unscales:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
                scaler.step(optimizer)
                if step in overflow_at and i == step % len(layers):
                    assert len(optimizer.state) == before[i]
            scaler.update()
            log.append(scaler.get_scale())
            log.append([seen(list(layer.parameters()), o) for layer, o in zip(layers, optimizers, strict=True)])
        return log

    assert_same(train(OURS), train(THEIRS))
