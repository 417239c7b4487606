"""DTensor parameters (FSDP2, tensor parallelism): an optimizer steps the shards that this process holds.

Every rule works element by element, so a step of the shards is the shard of a step. States are DTensors all the same,
placed as their parameter is, so that checkpoints are those of torch's optimizers.
"""

import sys
from collections import defaultdict

import torch

from .operator import SCALAR_KEYS


def shards_of(optimizer):
    """The optimizer's :class:`Shards`, or None if no parameter is a DTensor or if its states are placed otherwise."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is None:  # so there are none
        return None
    groups = optimizer.param_groups
    if not any(isinstance(param, dtensor) for group in groups for param in group["params"] if param.grad is not None):
        return None
    if any(group.get("differentiable") for group in groups):
        return None
    shards = Shards(optimizer, dtensor)
    return shards if shards.is_complete else None


class Shards:
    """The local tensors of an optimizer's parameters, gradients and states, as an optimizer of the same class.

    A gradient that is placed otherwise than its parameter is moved there, as torch's operators would move it.
    """

    def __init__(self, optimizer, dtensor):
        self.optimizer, self.dtensor = optimizer, dtensor
        self.pairs = []  # each parameter that has a gradient, its local tensor, and the states that were there
        self.twin = object.__new__(type(optimizer))
        self.twin.__dict__.update(optimizer.__dict__)
        self.twin.state = defaultdict(dict)
        self.twin.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
        self.is_complete = all(
            self._add(param, twin_group["params"])
            for group, twin_group in zip(optimizer.param_groups, self.twin.param_groups, strict=True)
            for param in group["params"]
            if param.grad is not None
        )

    def step(self):
        """One step of all shards; states that it made become DTensors in the optimizer's state."""
        self.twin._update()
        written = []
        for param, local, states in self.pairs:
            own_state = self.twin.state.get(local, {})
            for name, value in own_state.items():
                if value is not states.get(name):
                    self.optimizer.state[param][name] = self._distributed(name, value, param)
            if local is not param:
                written += [param, *(value for value in self.optimizer.state[param].values() if self._is_ours(value))]
        torch.autograd.graph.increment_version(written)

    def _add(self, param, params):
        """Add a parameter to the twin; False if only torch's operators can say how it is stepped."""
        states = self.optimizer.state.get(param, {})
        if not self._is_ours(param):
            local, local_states = param, dict(states)
        else:
            if any(placement.is_partial() for placement in param.placements):
                return False
            local = self._local(param).detach()
            local.grad = self._local(self._placed(param.grad, param))
            local_states = {}
            for name, value in states.items():
                if not self._fits(value, param):
                    return False
                local_states[name] = self._local(value) if self._is_ours(value) else value
        if local_states:
            self.twin.state[local] = dict(local_states)
        params.append(local)
        self.pairs.append((param, local, local_states))
        return True

    def _is_ours(self, value):
        return isinstance(value, self.dtensor)

    def _placed(self, grad, param):
        if grad.device_mesh == param.device_mesh and grad.placements == param.placements:
            return grad
        return grad.redistribute(param.device_mesh, param.placements)

    def _fits(self, value, param):
        """True if a state's local tensor belongs to the parameter's: placed like it, or a number all processes have."""
        if not self._is_ours(value):
            return not isinstance(value, torch.Tensor) or value.dim() == 0
        if value.dim() == 0 and all(placement.is_replicate() for placement in value.placements):
            return True
        return value.device_mesh == param.device_mesh and value.placements == param.placements

    @staticmethod
    def _local(tensor):
        local = tensor.to_local()
        return local.wait() if hasattr(local, "wait") else local  # a collective may be under way

    def _distributed(self, name, value, param):
        if not self._is_ours(param) or name in SCALAR_KEYS or not isinstance(value, torch.Tensor):
            return value
        return self.dtensor.from_local(
            value, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
