"""Adam and its AMSGrad variant."""

import torch

from .. import reference
from .optimizer import FusedOptimizer, without_hooks


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam: :class:`torch.optim.Adam` in one native call a step.

        grad        = (-grad if maximize else grad) + weight_decay * param         (decay: unless decoupled)
        param      -= lr * weight_decay * param                                    (if decoupled_weight_decay)
        exp_avg     = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad^2
        max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)                           (if amsgrad: used below)
        param      -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    float64, float32, bfloat16 and float16; 16-bit types compute in float32.

    Args:
        params: tensors, named tensors or dicts that define groups.
        lr: learning rate, number or tensor of one element. Default: 1e-3
        betas: decay rates of the running averages. Default: (0.9, 0.999)
        eps: added to the denominator, outside the root. Default: 1e-8
        weight_decay: L2 penalty, or decoupled decay. Default: 0
        amsgrad: divide by the largest second moment so far. Default: False
        foreach, fused: accepted with torch's meaning; the step is fused in any case.
        maximize: ascend instead of descend. Default: False
        capturable: keep ``step`` on the parameter's CUDA device, so that steps can be captured into a CUDA graph; the
            kernels read and count it there. An error on the CPU, as in torch. Default: False
        differentiable: take torch's own step. Default: False
        decoupled_weight_decay: decay parameters directly, as AdamW does. Default: False

    State of a parameter: ``step``, ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` if amsgrad.

    Raises:
        ValueError: as :class:`torch.optim.Adam`, for arguments out of range.

    Source: Kingma & Ba, arXiv:1412.6980, 2015; AMSGrad: Reddi, Kale & Kumar, arXiv:1904.09237, 2018.
    """

    _plan_name = "AdamPlan"
    _torch_step_function = without_hooks(torch.optim.Adam.step)
    _torch_init_group = torch.optim.Adam._init_group
    _option_names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")

    def _init_lists(self, group):
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = [], [], [], [], [], []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        return params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps

    def _all_tensors_match(self, options, lists):
        # Otherwise a bias correction may be 0 or have no root.
        return all(0 <= beta < 1 for beta in options["betas"]) and super()._all_tensors_match(options, lists)

    def _reference_step(self, options, *tensors):
        beta1, beta2 = options.pop("betas")
        reference.adam_(*tensors, beta1=beta1, beta2=beta2, **options)
