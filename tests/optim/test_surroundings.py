"""Checkpoints and what surrounds a step in programs: each gives with fastopt's class what it gives with torch's."""

import copy
import copyreg
import io
import itertools
import pickle

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from common import attempt
from optim_helpers import Maker, seen, step_through, with_torchs_class_and_ours
from optimizers import THEIRS


def kinds(params, optimizer):
    """Name, type, device and shape of each state."""
    states = [item for p in params for item in optimizer.state[p].items() if item[1] is not None]
    return [(name, type(value).__name__, value.device.type, value.shape) for name, value in states]


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints_that_lack_or_exceed(make):
    def without(state_dict, key):
        for group in state_dict["param_groups"]:
            group.pop(key, None)

    def add_keys(state_dict):
        state_dict["param_groups"][0]["extra"] = "kept"
        state_dict["state"][1]["extra"] = torch.ones(3)
        state_dict["more"] = 1

    def plain_steps(state_dict):
        for state in state_dict["state"].values():
            if "step" in state:
                state["step"] = state["step"].item()

    changes = [
        *(lambda s, key=key: without(s, key) for key in ("maximize", "foreach", "capturable", "differentiable")),
        *(lambda s, key=key: without(s, key) for key in ("fused", "amsgrad", "nesterov", "centered", "momentum", "lr")),
        *(lambda s, key=key: s["state"].get(0, {}).pop(key, None) for key in ("exp_avg", "step", "momentum_buffer")),
        lambda s: s["state"].pop(1, None),
        lambda s: s["state"].clear(),
        lambda s: s["param_groups"].append(dict(s["param_groups"][0])),
        lambda s: s["param_groups"][0]["params"].append(2),
        lambda s: s.pop("state"),
        lambda s: s.pop("param_groups"),
        lambda s: add_keys(s) if s["state"] else None,
        plain_steps,
    ]
    results = []
    for change in changes:
        params, optimizer = make.stepped()
        state_dict = copy.deepcopy(optimizer.state_dict())
        change(state_dict)
        other = make(params)
        found = attempt(lambda: other.load_state_dict(state_dict))  # noqa: B023
        found = found or attempt(lambda: step_through(other, params, 2))  # noqa: B023
        results.append((found, None if found else seen(params, other)))
    return results


def checkpoints_of_another_dtype(make):
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        in_torch = Maker(getattr(THEIRS, make.cls.__name__), make.options)
        _, optimizer = in_torch.stepped(dtype=torch.float64 if dtype != torch.float64 else torch.bfloat16)
        params = make.params(dtype)
        other = make(params)
        other.load_state_dict(optimizer.state_dict())
        step_through(other, params, 2)
        results.append(seen(params, other))
    return results


def copies_and_pickles(make):
    params, optimizer = make.stepped()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["optimizer"]
    results = [loaded]
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), copy.copy(optimizer)):
        results += [sorted(name for name in vars(copied) if not name.startswith("_")), sorted(copied.__getstate__())]
        results += [repr(copied), copied.state_dict()]
        own = [p for group in copied.param_groups for p in group["params"]]
        step_through(copied, own, 2)
        results.append(seen(own, copied))
    return results


def picklable(base):
    """Subclasses that are copied and pickled in ways of their own; of the module, for pickle."""

    class GivesItsDict(base):
        def __getstate__(self):
            return self.__dict__

    class GivesACopy(base):
        def __getstate__(self):
            return {**super().__getstate__(), "note": "kept"}

        def __setstate__(self, state):
            self.note = state.pop("note")
            super().__setstate__(state)

    class GivesTwo(base):
        def __reduce_ex__(self, protocol):
            return copyreg.__newobj__, (type(self),), self.__dict__.copy()

    for cls in (GivesItsDict, GivesACopy, GivesTwo):
        cls.__qualname__ = f"{cls.__name__}_{base.__module__.replace('.', '_')}_{base.__name__}"
        globals()[cls.__qualname__] = cls
        yield cls


def subclasses_that_are_pickled_in_their_own_way(make):
    results = []
    for cls in picklable(make.cls):
        params = make.params()
        optimizer = cls(params, **make.options)
        step_through(optimizer, params, 2)
        copies = [copy.deepcopy(optimizer), copy.copy(optimizer)]
        copies += [pickle.loads(pickle.dumps(optimizer, protocol)) for protocol in (2, 3, 4, 5)]
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        for copied in copies:
            own = [p for group in copied.param_groups for p in group["params"]]
            step_through(copied, own, 2, first=2)
            results.append((vars(copied).get("note"), seen(own, copied)))
        step_through(optimizer, params, 1)
    return results


# --- Surroundings -----------------------------------------------------------------------------------------------------


def modes_around_a_step(make):
    results = []
    for mode in (torch.no_grad, torch.enable_grad, torch.autograd.detect_anomaly, torch.inference_mode):
        params, optimizer = make.stepped(0)
        with mode(), torch.autograd.profiler.record_function("around"):
            results.append(attempt(lambda: step_through(optimizer, params, 2)))  # noqa: B023
            results.append(torch.is_grad_enabled())
        results.append(attempt(lambda: step_through(optimizer, params, 2)))  # noqa: B023
        results.append([p.detach().clone() for p in params])
    return results


def deterministic_algorithms(make):
    torch.use_deterministic_algorithms(True)
    try:
        return seen(*make.stepped(4))
    finally:
        torch.use_deterministic_algorithms(False)


def another_default_dtype(make):
    torch.set_default_dtype(torch.float64)
    try:
        return seen(*make.stepped(3)), seen(*make.stepped(3, torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)


def swapped_and_lazy_modules(make):
    module = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))
    optimizer = attempt(lambda: make(module.parameters()))
    if isinstance(optimizer, tuple):  # states that the constructor makes need a shape
        return optimizer
    torch.manual_seed(0)
    module(torch.ones(1, 4))
    params = list(module.parameters())
    with torch.no_grad():
        for p in params:
            p.copy_(torch.linspace(0, 1, p.numel()).reshape(p.shape))
    step_through(optimizer, params, 2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert [p.dtype for p in params] == [torch.float64] * 4
    found = attempt(lambda: step_through(optimizer, params, 2, first=2))
    return found, None if found else seen(params, optimizer)


def gradients_of_another_dtype(make):
    results = []
    for dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        params = make.params(dtype)
        optimizer = make(params)
        for p in params:
            p.grad_dtype = grad_dtype
            p.grad = torch.linspace(-1, 1, p.numel(), dtype=grad_dtype).reshape(p.shape)
        found = attempt(lambda: [optimizer.step() for _ in range(3)])  # noqa: B023
        results.append(found if isinstance(found, tuple) else seen(params, optimizer))
    return results


def forward_mode(make):
    """The tangents of parameters follow those of gradients, as through torch's operators."""
    results = []
    for has_tangents in itertools.product((False, True), repeat=2):
        params, optimizer = make.stepped()
        with forward_ad.dual_level():
            own, grads = [], []
            for p in params:
                value = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape)
                grads.append(forward_ad.make_dual(value, value.cos()) if has_tangents[0] else value.clone())
                own.append(forward_ad.make_dual(p.detach().clone(), p.detach().sin()) if has_tangents[1] else p)
            optimizer.param_groups[0]["params"] = own
            optimizer.state.clear()
            for p, grad in zip(own, grads, strict=True):
                p.grad = grad
            for _ in range(2):
                results.append(attempt(optimizer.step))
                duals = [tuple(forward_ad.unpack_dual(p)) for p in own]
                results.append([[None if t is None else t.detach().clone() for t in dual] for dual in duals])
            results.append(len(optimizer.state))
    return results


def functional_optimizers(make):
    """Those that ``torch.distributed.optim`` has for a class, and none for a subclass."""
    from torch.distributed.optim.utils import as_functional_optim, functional_optim_map

    if make.cls not in functional_optim_map:
        return None
    optimizer = as_functional_optim(make.cls, lr=0.125)
    params = [p.detach() for p in make.params()]
    for _ in range(2):
        attempt(lambda: optimizer.step_param(params[0], torch.ones_like(params[0])))  # RMSprop's has none
    subclass = type("Sub", (make.cls,), {})
    return (
        type(optimizer).__name__,
        functional_optim_map[make.cls].__name__,
        subclass in functional_optim_map,
        params[0],
    )


def fake_and_meta_tensors(make):
    with FakeTensorMode():
        fake = kinds(*make.stepped())
    params = [torch.nn.Parameter(p.to("meta")) for p in make.params()]
    optimizer = make(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return fake, kinds(params, optimizer)


test_program_gives_the_same_with_torchs_class = with_torchs_class_and_ours(
    [
        checkpoints_that_lack_or_exceed,
        checkpoints_of_another_dtype,
        copies_and_pickles,
        subclasses_that_are_pickled_in_their_own_way,
        modes_around_a_step,
        deterministic_algorithms,
        another_default_dtype,
        swapped_and_lazy_modules,
        gradients_of_another_dtype,
        fake_and_meta_tensors,
        forward_mode,
        functional_optimizers,
    ]
)
