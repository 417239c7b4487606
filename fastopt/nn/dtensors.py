"""Cross-entropy of DTensors."""

import sys

import torch

from . import vocab_parallel


def cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing):
    """Cross-entropy of DTensor logits that are sharded by class, which are not gathered; None for all other arguments.

    As in torch, targets and weights may be plain tensors, the same in all processes, inside ``loss_parallel()``.
    """
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is None or not isinstance(input, dtensor):
        return None
    mesh, class_dim = input.device_mesh, vocab_parallel.class_dim(input)
    by_class = [mesh_dim for mesh_dim, placement in enumerate(input.placements) if placement.is_shard(class_dim)]
    others = [placement for mesh_dim, placement in enumerate(input.placements) if mesh_dim not in by_class]
    given = [tensor for tensor in (target, weight) if tensor is not None]
    if (
        len(by_class) != 1
        or not all(placement.is_replicate() for placement in others)
        or target.is_floating_point()
        or not all(_is_replicated(tensor, mesh, dtensor) for tensor in given)
    ):
        return None
    if weight is not None:
        weight = _as_dtensor(weight, mesh, dtensor)
        placements = [
            _shard(0) if mesh_dim in by_class else placement for mesh_dim, placement in enumerate(weight.placements)
        ]
        weight = weight.redistribute(mesh, placements).to_local()
    target = target.to_local() if isinstance(target, dtensor) else target
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = vocab_parallel.cross_entropy(input.to_local(), target, mesh.get_group(by_class[0]), weight, **options)
    return _as_dtensor(loss, mesh, dtensor)


def _is_replicated(tensor, mesh, dtensor):
    if isinstance(tensor, dtensor):
        return tensor.device_mesh == mesh and all(placement.is_replicate() for placement in tensor.placements)
    dispatcher = getattr(dtensor, "_op_dispatcher", None)
    return torch.ops.aten.nll_loss_forward.default in getattr(dispatcher, "_custom_op_handlers", ())


def _as_dtensor(tensor, mesh, dtensor):
    if isinstance(tensor, dtensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return dtensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _shard(dim):
    from torch.distributed.tensor import Shard

    return Shard(dim)
