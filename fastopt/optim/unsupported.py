"""Optimizers some of whose parameters no kernel takes: sparse or complex, of a layout or dtype without a kernel.

The kernels step the others; an optimizer of the same class steps the unsupported ones. Every rule works parameter by
parameter, so their order has no effect where they share no memory.
"""

from collections import defaultdict


def step_in_two(optimizer, plan, reads_scaling):
    """Step the unsupported parameters, and the others by kernels; False, and nothing changed, if that is impossible."""
    params = plan.unsupported_params(optimizer, reads_scaling)
    if not params:
        return False
    ids = set(map(id, params))
    # First those that can fail: the others have been checked.
    _step_part(optimizer, [[p for p in group["params"] if id(p) in ids] for group in optimizer.param_groups])
    if not plan.step_without(params, optimizer, reads_scaling):  # another thread has replaced something
        _step_part(optimizer, [[p for p in group["params"] if id(p) not in ids] for group in optimizer.param_groups])
    return True


def _step_part(optimizer, lists):
    """A step of some parameters of each group, without kernels."""
    part = object.__new__(type(optimizer))
    part.__dict__.update(optimizer.__dict__, _plan=None, grad_scale=None, found_inf=None)
    groups = zip(optimizer.param_groups, lists, strict=True)
    part.param_groups = [{**group, "params": params} for group, params in groups if params]
    states = [(param, optimizer.state.get(param)) for params in lists for param in params]
    part.state = defaultdict(dict, {param: state for param, state in states if state is not None})
    part._update_without_kernels()
    for param, state in part.state.items():
        optimizer.state.setdefault(param, state)
