"""Cross-entropy of logits whose classes are sharded over processes; a few numbers per position are communicated."""

import torch
import torch.distributed as dist
from torch.nn import _reduction

from .. import _calls
from .._build import native


class SavedGroup:
    """The name of a process group, which can be copied and pickled instead of the group.

    Args:
        name: the group's name, the same in all runs that create their groups in the same order.
    """

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"the process group {self.name!r} of a loss that was saved"

    def resolved(self):
        """The group of that name in this process, or this if there is none."""
        try:
            return dist.distributed_c10d._resolve_process_group(self.name)
        except (RuntimeError, ValueError):
            return self


_SIZE_BASE = 4096  # sizes travel as two digits, which any floating-point type of the exchange holds exactly


def cross_entropy(input, target, process_group, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0):
    r"""Cross-entropy of logits of which each process of a group holds some classes.

        max_i  = max_c input_ic                                                    (all-reduced)
        lse_i  = max_i + log sum_c exp(input_ic - max_i)                           (the sum is all-reduced)
        loss_i = sum_c q_ic (lse_i - input_ic)                                     (q: see functional.cross_entropy)

    The processes hold the classes in the order of their ranks: the first rank those from 0 on. Shares may differ in
    size and be empty. Forward communicates two to five numbers per position, backward none.

    Args:
        input: this process's logits, shape (C_here,), (N, C_here) or (N, C_here, d1, ...).
        target: class indices among all classes, the same in all processes; int64.
        process_group: the processes that share the classes.
        weight: weights of this process's classes, shape (C_here,), or None for all ones. Default: None
        reduction, ignore_index, label_smoothing: as :func:`fastopt.functional.cross_entropy`.

    Returns:
        The loss, the same in all processes; its gradient is that of this process's logits.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or options disagree, before anything is communicated.
        IndexError: a target is neither a class nor ``ignore_index``; on a GPU the loss is NaN instead.

    The CPU kernels take rows that they take without a group; for all other logits, operators of torch compute the same.

    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, 2019, section 3.
    """
    _check(input, target, process_group, weight, reduction, label_smoothing)
    loss, target_weight = _CrossEntropy.apply(input, target, weight, ignore_index, label_smoothing, process_group)
    if reduction == "mean":
        loss = loss.sum() / target_weight.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


def class_dim(input):
    """The dimension of the classes."""
    return 1 if input.dim() > 1 else 0


def _check(input, target, process_group, weight, reduction, label_smoothing):
    """Raise for errors that this process can detect."""
    if isinstance(process_group, SavedGroup):
        raise RuntimeError(f"process_group must be set: {process_group} does not exist in this process")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}")
    if hasattr(input, "device_mesh"):
        raise TypeError("with process_group, input must be this process's logits, got a DTensor, which needs no group")
    _reduction.get_enum(reduction)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if target.is_floating_point():
        raise ValueError("with process_group, target must be class indices: probabilities are not supported")
    if target.dtype != torch.int64:
        raise RuntimeError(f"expected target dtype to be Long, but got {target.dtype}")
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating point, got {input.dtype}")
    positions = [*input.shape[:1], *input.shape[2:]] if input.dim() > 1 else []
    if input.dim() == 0 or list(target.shape) != positions:
        raise ValueError(f"Expected target size {positions}, got {list(target.shape)}")
    if weight is not None:
        n_classes = input.shape[class_dim(input)]
        if weight.shape != (n_classes,):
            raise RuntimeError(
                f"weight must have shape ({n_classes},), one weight for each of this process's classes, "
                f"got {tuple(weight.shape)}"
            )
        if weight.dtype != input.dtype:
            raise RuntimeError(f"expected scalar type {input.dtype} but found {weight.dtype} for weight")
        if weight.requires_grad:
            raise ValueError("with process_group, weight must not require grad")


class _CrossEntropy(torch.autograd.Function):
    """Loss of each position, and the weight of its target (0 if ignored), in the compute type."""

    @staticmethod
    def forward(ctx, input, target, weight, ignore_index, label_smoothing, group):
        dim = class_dim(input)
        n_classes = input.shape[dim]
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        weight = None if weight is None else weight.to(dtype).contiguous()
        is_smoothed = label_smoothing > 0

        is_kept = target != ignore_index
        largest_here, exp_sum, *logit_sum = _totals(input, is_kept, weight, is_smoothed, dtype)
        largest, sizes = _all_reduce_max_and_sizes(largest_here.to(dtype), n_classes, group)
        start = (sizes.cumsum(0) - sizes)[dist.get_rank(group)]
        n_all_classes = sizes.sum().to(dtype)

        is_wrong = is_kept & ((target < 0) | (target >= n_all_classes))
        if input.device.type == "cpu" and is_wrong.any():
            raise IndexError(f"Target {target[is_wrong].flatten()[0].item()} is out of bounds.")
        target = target - start
        is_here = _is_here(target, is_kept, n_classes)
        index = torch.where(is_here, target, 0).unsqueeze(dim)

        # The largest logit is subtracted first: a shift common to all logits must not change the loss.
        shift = largest_here - largest
        zeros = torch.zeros_like(largest)
        parts = [exp_sum * shift.exp(), zeros]
        if n_classes:
            parts[1] = torch.where(is_here, input.gather(dim, index).squeeze(dim).to(dtype) - largest, 0)
        if weight is not None:
            parts.append(torch.where(is_here, weight[index.squeeze(dim)], 0) if n_classes else zeros)
        if is_smoothed:
            weight_sum = n_classes if weight is None else weight.sum()
            parts += [logit_sum[0] + weight_sum * shift, zeros + weight_sum]
        exp_sum, target_logit, *parts = _all_reduce_sum(torch.stack(parts).to(dtype), group)

        log_sum = exp_sum.log()
        target_weight = parts.pop(0) if weight is not None else torch.ones_like(log_sum)
        target_share = (1 - label_smoothing) * target_weight
        loss = target_share * (log_sum - target_logit)
        share, smoothed_sum = label_smoothing / n_all_classes, zeros
        if is_smoothed:
            logit_sum, weight_sum = parts
            loss = loss + share * (weight_sum * log_sum - logit_sum)
            smoothed_sum = share * weight_sum
        loss = torch.where(is_kept, loss, 0).masked_fill_(is_wrong, torch.nan)
        target_share = target_share.masked_fill(is_wrong, torch.nan)

        ctx.is_smoothed = is_smoothed
        ctx.save_for_backward(input, weight, target, is_kept, largest, exp_sum, smoothed_sum, target_share, share)
        target_weight = torch.where(is_kept, target_weight, 0)
        ctx.mark_non_differentiable(target_weight)
        return loss, target_weight

    @staticmethod
    def backward(ctx, grad_loss, _):
        if torch.is_grad_enabled():  # create_graph=True: the code below treats sums over all classes as constants
            raise RuntimeError("cross-entropy with process_group cannot be differentiated twice")
        return _gradient(ctx, grad_loss), None, None, None, None, None


def _totals(input, is_kept, weight, is_smoothed, dtype):
    """Of each position, over this process's classes: max, sum exp(x - max) and, if smoothed, sum w (x - max)."""
    library = _library(input)
    if library is not None:
        totals = library.cross_entropy_shard_totals(input, is_kept.view(-1), weight, is_smoothed)
        if totals is not None:
            return totals.view(-1, *is_kept.shape)
    _calls.note("cross_entropy", "reference")
    dim = class_dim(input)
    lowest = torch.finfo(dtype).min  # not -inf: -inf - -inf is not a number
    if not input.shape[dim]:
        totals = input.new_zeros(3, *is_kept.shape, dtype=dtype)
        totals[0] = lowest
        return totals
    largest = input.amax(dim).to(dtype).clamp_(min=lowest)
    shifted = input.to(dtype) - largest.unsqueeze(dim)
    totals = [largest, shifted.exp().sum(dim)]
    if is_smoothed:
        totals.append((shifted if weight is None else shifted.mul_(weight.view(_along(dim, input.dim())))).sum(dim))
    return totals


def _gradient(ctx, grad_loss):
    """The gradient of this process's logits."""
    input, weight, target, is_kept, largest, exp_sum, smoothed_sum, target_share, share = ctx.saved_tensors
    library = _library(input)
    if library is not None:
        numbers = torch.stack([largest, exp_sum, smoothed_sum, target_share, grad_loss]).double().view(5, -1)
        flat = (target.view(-1), is_kept.view(-1), weight, numbers)
        grad = library.cross_entropy_shard_gradient(input, *flat, share.item(), ctx.is_smoothed)
        if grad is not None:
            return grad
    dim = class_dim(input)
    n_classes = input.shape[dim]
    grad = (input.to(largest.dtype) - largest.unsqueeze(dim)).exp_()
    grad.mul_((grad_loss * (target_share + smoothed_sum) / exp_sum).unsqueeze(dim))
    if ctx.is_smoothed:
        smoothed = (grad_loss * share).unsqueeze(dim)
        grad.sub_(smoothed if weight is None else smoothed * weight.view(_along(dim, input.dim())))
    if n_classes:
        is_here = _is_here(target, is_kept, n_classes)
        on_target = torch.where(is_here, -grad_loss * target_share, 0)
        grad.scatter_add_(dim, torch.where(is_here, target, 0).unsqueeze(dim), on_target.unsqueeze(dim))
    grad.masked_fill_(~is_kept.unsqueeze(dim), 0)
    return grad.to(input.dtype)


def _library(input):
    """The compiled kernels, if they may support these logits."""
    may_take = input.is_cpu and input.dim() <= 2 and not torch.compiler.is_compiling()
    return native.module() if may_take else None


def _is_here(target, is_kept, n_classes):
    return is_kept & (target >= 0) & (target < n_classes)


def _along(dim, n_dims):
    return [-1 if d == dim else 1 for d in range(n_dims)]


def _all_reduce_max_and_sizes(values, size, group):
    """The elementwise maximum over the group, and the size in each of its processes, by one exchange."""
    n_processes = dist.get_world_size(group)
    digits = values.new_full((n_processes, 2), -torch.inf)
    digits[dist.get_rank(group)] = values.new_tensor(divmod(size, _SIZE_BASE))
    message = torch.cat([values.flatten(), digits.flatten()])
    dist.all_reduce(message, dist.ReduceOp.MAX, group)
    sizes = message[values.numel() :].view(n_processes, 2).long()
    return message[: values.numel()].view(values.shape), sizes[:, 0] * _SIZE_BASE + sizes[:, 1]


def _all_reduce_sum(values, group):
    dist.all_reduce(values, dist.ReduceOp.SUM, group)
    return values
