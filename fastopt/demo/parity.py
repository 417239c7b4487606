"""Judges if the two trainings are the same training.

Float32 trajectories part on their own: one rounding flips one ReLU, and Adam or RMSprop turns that into a step. So the
first steps are compared one by one too: on the same logits, is fastopt's loss torch's; fed the same gradients, are
fastopt's weights torch's. Later steps have wider tolerances.
"""

from dataclasses import dataclass

import numpy as np
import torch

N_CHECKED_STEPS = 20
LOSS_TOLERANCE = UPDATE_TOLERANCE = 1e-5
END_LOSS_TOLERANCE, ACCURACY_TOLERANCE_PERCENT = 0.1, 2.0
DIVERGED_LOSS = 1e30  # one step before float32 overflows; which training does so first is chance
FLOAT32_EPS = torch.finfo(torch.float32).eps

CRITERION = f"""\
Parity holds if
  on the same logits, the loss and its gradient differ by at most {LOSS_TOLERANCE:g} of their size
    (first {N_CHECKED_STEPS} steps; times the largest logit where that is above 1);
  fed the same gradients, the weights differ in norm by at most {UPDATE_TOLERANCE:g} of the way they moved, plus one
    rounding of the weights per step (first {N_CHECKED_STEPS} steps);
  every loss of both trainings is below {DIVERGED_LOSS:g};
  their mean losses over the last fifth of the steps differ by at most {END_LOSS_TOLERANCE:g}, or a quarter of torch's;
  their test accuracies differ by at most {ACCURACY_TOLERANCE_PERCENT:g} points, or a quarter of torch's errors."""


@dataclass(frozen=True)
class Verdict:
    """Parity holds or not, the reasons, and the figures it was judged by."""

    ok: bool
    diverged: bool  # the losses of both trainings became NaN or too large, and they agreed until then
    reasons: tuple
    max_loss_error: float  # on the same logits, as a share of what is allowed
    max_update_error: float  # on the same gradients, as a share of what is allowed
    max_loss_difference: float  # between the trainings
    end_loss_difference: float
    accuracy_difference_percent: float


class Shadow:
    """Runs fastopt's loss on torch's logits, and fastopt's optimizer over ``model`` on torch's gradients."""

    def __init__(self, model, optimizer, loss, torch_loss):
        self.params, self.optimizer = list(model.parameters()), optimizer
        self.loss, self.torch_loss, self.start = loss, torch_loss, _flat(self.params)
        self.loss_errors, self.update_errors = [], []

    def check(self, torch_params, logits, labels):
        """One step after torch's: its parameters still hold the gradients that moved them."""
        self.loss_errors.append(self._loss_error(logits.detach(), labels))
        for param, torch_param in zip(self.params, torch_params, strict=True):
            param.grad = torch_param.grad.clone()
        self.optimizer.step()
        ours, theirs, n_steps = _flat(self.params), _flat(torch_params), len(self.update_errors) + 1
        allowed = UPDATE_TOLERANCE * (theirs - self.start).norm() + n_steps * FLOAT32_EPS * theirs.norm()
        self.update_errors.append(((ours - theirs).norm() / allowed).item())

    def _loss_error(self, logits, labels):
        found = []
        for loss in (self.torch_loss, self.loss):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, labels)
            found.append((value.detach().double(), torch.autograd.grad(value, leaf)[0].double()))
        (value, grad), (our_value, our_grad) = found
        value_error = (our_value - value).abs() / value.abs().clamp(min=1e-3)
        grad_error = (our_grad - grad).abs().max() / grad.abs().max().clamp(min=1e-30)
        allowed = LOSS_TOLERANCE * logits.abs().max().clamp(min=1).double()
        return (torch.maximum(value_error, grad_error) / allowed).item()


def judge(shadow, torch_losses, fastopt_losses, torch_accuracy, fastopt_accuracy):
    """The verdict by :data:`CRITERION` on a :class:`Shadow`, the loss of each step, and accuracies in percent."""
    sides = {"torch": torch_losses, "fastopt": fastopt_losses}
    lost = {side: _first_false(loss < DIVERGED_LOSS for loss in losses) for side, losses in sides.items()}
    both_lost = None not in lost.values()
    n_judged = lost["torch"] if both_lost else N_CHECKED_STEPS
    reasons = []
    for checked, errors in (
        ("on the same logits the losses", shadow.loss_errors[:n_judged]),
        # The step before torch's loss was lost has moved the weights out of what float32 holds.
        ("fed the same gradients the weights", shadow.update_errors[: max(0, n_judged - both_lost)]),
    ):
        broken = _first_false(error <= 1 for error in errors)  # as NaN is
        if broken is not None:
            reasons.append(f"{checked} differ in step {broken + 1} by {errors[broken]:.3g} times what is allowed")
    diverged = both_lost and not reasons
    reasons += [f"{side}'s loss in step {i + 1} is {sides[side][i]:g}" for side, i in lost.items() if i is not None]

    n_end = max(1, len(torch_losses) // 5)
    torch_end, fastopt_end = (sum(losses[-n_end:]) / n_end for losses in sides.values())
    end, allowed = abs(torch_end - fastopt_end), max(END_LOSS_TOLERANCE, torch_end / 4)
    if end > allowed and not diverged:
        reasons.append(f"mean losses of the last {n_end} steps differ by {end:.3f}, {allowed:.3f} allowed")
    accuracy = abs(torch_accuracy - fastopt_accuracy)
    allowed = max(ACCURACY_TOLERANCE_PERCENT, (100 - torch_accuracy) / 4)
    if accuracy > allowed and not diverged:
        reasons.append(f"test accuracies differ by {accuracy:.2f} points, {allowed:.2f} allowed")
    differences = [abs(a - b) for a, b in zip(torch_losses, fastopt_losses, strict=True)]
    # The largest; NaN if any is NaN.
    figures = (float(np.max(errors)) for errors in (shadow.loss_errors, shadow.update_errors, differences))
    return Verdict(not reasons, diverged, tuple(reasons), *figures, end, accuracy)


def _flat(params):
    return torch.cat([param.detach().flatten().double() for param in params])


def _first_false(values):
    return next((index for index, value in enumerate(values) if not value), None)
