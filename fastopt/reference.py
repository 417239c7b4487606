"""Losses in plain torch: the fallback, and the truth that kernels are measured against.

16-bit logits compute in float32 and are rounded once, as in the kernels.
"""

import torch
from torch.nn import _reduction

# torch's own loss below torch.nn.functional.cross_entropy, which others replace, by fastopt's for one.
torch_cross_entropy = torch._C._nn.cross_entropy_loss


def cross_entropy(input, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0):
    """Cross-entropy, see :func:`fastopt.functional.cross_entropy`; 16-bit logits compute in float32."""
    options = (_reduction.get_enum(reduction), ignore_index, label_smoothing)
    is_half = input.dtype in (torch.bfloat16, torch.float16)
    if not is_half or not isinstance(target, torch.Tensor) or torch.is_autocast_enabled(input.device.type):
        return torch_cross_entropy(input, target, weight, *options)
    if weight is not None and weight.dtype != input.dtype or target.is_floating_point() and target.dtype != input.dtype:
        return torch_cross_entropy(input, target, weight, *options)  # for torch to raise, or not
    target = target.float() if target.is_floating_point() and target.shape == input.shape else target
    weight = weight.float() if weight is not None else None
    return torch_cross_entropy(input.float(), target, weight, *options).to(input.dtype)


def cross_entropy_gradient(input, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0):
    """Gradient of :func:`cross_entropy` by its formula, without autograd; of each row's own loss for "none"."""
    dim = 1 if input.dim() > 1 else 0
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    n_classes = input.shape[dim]
    weight = torch.ones(n_classes, dtype=dtype) if weight is None else weight.to(dtype)
    along_classes = [-1 if d == dim else 1 for d in range(input.dim())]
    spread = (weight * (label_smoothing / n_classes)).view(along_classes)
    if target.is_floating_point():
        q = weight.view(along_classes) * (1 - label_smoothing) * target.to(dtype) + spread
        is_kept, denominator = torch.ones((), dtype=torch.bool), input.numel() / n_classes
    else:
        is_kept = (target != ignore_index).unsqueeze(dim)
        index = torch.where(is_kept, target.unsqueeze(dim), 0)
        on = weight[index] * is_kept
        q = torch.zeros_like(input, dtype=dtype).scatter_(dim, index, (1 - label_smoothing) * on) + spread
        denominator = on.sum()
    grad = torch.where(is_kept, q.sum(dim, keepdim=True) * input.to(dtype).softmax(dim) - q, 0.0)
    return grad / denominator if reduction == "mean" else grad
