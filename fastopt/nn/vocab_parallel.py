"""Cross-entropy of logits whose classes are spread over processes; a few numbers a position are communicated."""

import sys

import torch
import torch.distributed as dist
from torch.nn import _reduction


class SavedGroup:
    """The name of a process group in its stead, which can be copied and pickled.

    Args:
        name: the group's name, which processes that are started in the same way give it again.
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
    size and be empty. Forward communicates two to five numbers a position, backward none.

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

    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, 2019, section 3.
    """
    _check(input, target, process_group, weight, reduction, label_smoothing)
    loss, target_weight = _CrossEntropy.apply(input, target, weight, ignore_index, label_smoothing, process_group)
    if reduction == "mean":
        loss = loss.sum() / target_weight.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


def cross_entropy_of_dtensors(input, target, weight, reduction, ignore_index, label_smoothing):
    """Cross-entropy of DTensor logits that are sharded by class, which are not gathered; None for all other arguments.

    As in torch, targets and weights may be plain tensors, the same in all processes, inside ``loss_parallel()``.
    """
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is None or not isinstance(input, dtensor):
        return None
    mesh, class_dim = input.device_mesh, _class_dim(input)
    by_class = [mesh_dim for mesh_dim, placement in enumerate(input.placements) if placement.is_shard(class_dim)]
    others = [placement for mesh_dim, placement in enumerate(input.placements) if mesh_dim not in by_class]
    given = [tensor for tensor in (target, weight) if tensor is not None]
    if (
        len(by_class) != 1
        or not all(placement.is_replicate() for placement in others)
        or target.is_floating_point()
        or not all(_is_everywhere(tensor, mesh, dtensor) for tensor in given)
    ):
        return None
    if weight is not None:
        weight = _replicated(weight, mesh, dtensor)
        placements = [
            _shard(0) if mesh_dim in by_class else placement for mesh_dim, placement in enumerate(weight.placements)
        ]
        weight = weight.redistribute(mesh, placements).to_local()
    target = target.to_local() if isinstance(target, dtensor) else target
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = cross_entropy(input.to_local(), target, mesh.get_group(by_class[0]), weight, **options)
    return _replicated(loss, mesh, dtensor)


def _is_everywhere(tensor, mesh, dtensor):
    if isinstance(tensor, dtensor):
        return tensor.device_mesh == mesh and all(placement.is_replicate() for placement in tensor.placements)
    dispatcher = getattr(dtensor, "_op_dispatcher", None)
    return torch.ops.aten.nll_loss_forward.default in getattr(dispatcher, "_custom_op_handlers", ())


def _replicated(tensor, mesh, dtensor):
    if isinstance(tensor, dtensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return dtensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _shard(dim):
    from torch.distributed.tensor import Shard

    return Shard(dim)


def _class_dim(input):
    return 1 if input.dim() > 1 else 0


def _check(input, target, process_group, weight, reduction, label_smoothing):
    """Raise for what this process can see to be wrong."""
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
        n_classes = input.shape[_class_dim(input)]
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
    """Loss of each position, and the weight of its target (0 if ignored), in the type that is computed in."""

    @staticmethod
    def forward(ctx, input, target, weight, ignore_index, label_smoothing, group):
        dim = _class_dim(input)
        n_classes = input.shape[dim]
        logits = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
        weight = None if weight is None else weight.to(logits.dtype)

        largest = logits.amax(dim) if n_classes else logits.new_full(target.shape, -torch.inf)
        largest, sizes = _all_reduce_max_and_sizes(largest, n_classes, group)
        start = (sizes.cumsum(0) - sizes)[dist.get_rank(group)]
        n_all_classes = sizes.sum().to(logits.dtype)

        is_kept = target != ignore_index
        is_wrong = is_kept & ((target < 0) | (target >= n_all_classes))
        if input.device.type == "cpu" and is_wrong.any():
            raise IndexError(f"Target {target[is_wrong].flatten()[0].item()} is out of bounds.")
        index = target - start
        is_here = is_kept & (index >= 0) & (index < n_classes)
        index = torch.where(is_here, index, 0).unsqueeze(dim)

        # The largest logit is subtracted first: a shift common to all logits must not change the loss.
        shifted = logits - largest.unsqueeze(dim)
        nothing = torch.zeros_like(largest)
        target_logit = torch.where(is_here, shifted.gather(dim, index).squeeze(dim), 0) if n_classes else nothing
        parts = [shifted.exp().sum(dim), target_logit]
        if weight is not None:
            parts.append(torch.where(is_here, weight[index.squeeze(dim)], 0) if n_classes else nothing)
        if label_smoothing > 0:
            along_classes = _along(dim, input.dim())
            parts.append((shifted if weight is None else shifted * weight.view(along_classes)).sum(dim))
            parts.append((n_classes * torch.ones_like(nothing)) if weight is None else nothing + weight.sum())
        del shifted
        exp_sum, target_logit, *parts = _all_reduce_sum(torch.stack(parts), group)

        log_sum = exp_sum.log()
        target_weight = parts.pop(0) if weight is not None else torch.ones_like(log_sum)
        loss = target_weight * (log_sum - target_logit)
        coefficient = target_weight
        if label_smoothing > 0:
            logit_sum, weight_sum = parts
            share = label_smoothing / n_all_classes
            loss = (1 - label_smoothing) * loss + share * (weight_sum * log_sum - logit_sum)
            coefficient = (1 - label_smoothing) * target_weight + share * weight_sum
        loss = torch.where(is_kept, loss, 0).masked_fill_(is_wrong, torch.nan)
        coefficient = coefficient.masked_fill(is_wrong, torch.nan)
        target_weight = torch.where(is_kept, target_weight, 0)

        ctx.label_smoothing = label_smoothing
        target_share = (1 - label_smoothing) * target_weight
        ctx.save_for_backward(
            input, weight, index, is_here, is_kept, largest, log_sum, coefficient, target_share, n_all_classes
        )
        ctx.mark_non_differentiable(target_weight)
        return loss, target_weight

    @staticmethod
    def backward(ctx, grad_loss, _):
        if torch.is_grad_enabled():  # create_graph=True: what follows holds sums over all classes constant
            raise RuntimeError("cross-entropy with process_group cannot be differentiated twice")
        input, weight, index, is_here, is_kept, largest, log_sum, coefficient, target_share, n_all_classes = (
            ctx.saved_tensors
        )
        dim = _class_dim(input)
        grad = (input.to(largest.dtype) - largest.unsqueeze(dim)).sub_(log_sum.unsqueeze(dim)).exp_()
        grad.mul_((grad_loss * coefficient).unsqueeze(dim))
        if ctx.label_smoothing > 0:
            spread = (grad_loss * (ctx.label_smoothing / n_all_classes)).unsqueeze(dim)
            grad.sub_(spread if weight is None else spread * weight.view(_along(dim, input.dim())))
        if input.shape[dim]:
            on_target = torch.where(is_here, -grad_loss * target_share, 0)
            grad.scatter_add_(dim, index, on_target.unsqueeze(dim))
        grad.masked_fill_(~is_kept.unsqueeze(dim), 0)
        return grad.to(input.dtype), None, None, None, None, None


def _along(dim, n_dims):
    return [-1 if d == dim else 1 for d in range(n_dims)]


def _all_reduce_max_and_sizes(values, size, group):
    """The elementwise maximum over the group, and the size that each of its processes gave, in one exchange."""
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
