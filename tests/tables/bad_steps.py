"""The table of odd parameters, gradients and states: what each row does to the second parameter of an optimizer.

A step that fails halfway then shows in the first parameter.
"""

import numpy as np
import torch

NAN, INF = float("nan"), float("inf")


def data(values):
    """The parameter's memory; its gradient and states stay."""

    def spoil(params, optimizer):
        params[1].data = values(params[1].data)

    return spoil


def grad(values):
    def spoil(params, optimizer):
        params[1].grad = values(params[1])

    return spoil


def whole(values):
    """Parameter and gradient, as if made so from the start."""

    def spoil(params, optimizer):
        params[1].grad = None
        params[1].data = values(params[1].data)
        params[1].grad = values(torch.full((2, 3), 0.5))

    return spoil


def other_param(values):
    """Another parameter in its place: for types that .data does not take."""

    def spoil(params, optimizer):
        params[1] = values()
        optimizer.param_groups[1]["params"][0] = params[1]
        params[1].grad = torch.ones_like(params[1])

    return spoil


def states(values, names=("momentum_buffer", "exp_avg", "square_avg")):
    """Its first state."""

    def spoil(params, optimizer):
        state = optimizer.state[params[1]]
        for name in names:
            if name in state:
                state[name] = values(state[name])

    return spoil


def step(values):
    return states(values, names=("step",))


def last_state(values):
    return states(values, names=("max_exp_avg_sq", "grad_avg", "exp_avg_sq"))


def own_state(make_value):
    def spoil(params, optimizer):
        optimizer.state[params[1]] = make_value()

    return spoil


def sparse(params, optimizer):
    params[1] = torch.nn.Parameter(torch.eye(2, 3).to_sparse())
    params[1].grad = torch.eye(2, 3).to_sparse()
    optimizer.param_groups[1]["params"][0] = params[1]


def share_state(params, optimizer):
    params[1].data, params[1].grad = torch.ones(3), None
    params[1].grad = torch.ones(3)
    optimizer.state[params[1]] = dict(optimizer.state[params[0]])


def first_state_is_the_parameter(params, optimizer):
    for name in ("momentum_buffer", "exp_avg", "square_avg"):
        if name in optimizer.state[params[1]]:
            optimizer.state[params[1]][name] = params[1].data


def first_state_is_the_gradient(params, optimizer):
    for name in ("momentum_buffer", "exp_avg", "square_avg"):
        if name in optimizer.state[params[1]]:
            optimizer.state[params[1]][name] = params[1].grad


def grad_is_the_parameter(params, optimizer):
    params[1].grad = params[1].data


def views_of_one_storage(params, optimizer):
    base = torch.arange(8.0)
    params[0].data, params[1].data = base[:3], base[2:].view(2, 3)


def view_of_a_leaf(params, optimizer):
    params[1] = torch.ones(2, 3, requires_grad=True)[:1]
    params[1].grad = torch.ones(1, 3)
    optimizer.param_groups[1]["params"][0] = params[1]


def inference_parameter(params, optimizer):
    with torch.inference_mode():
        params[1].data = torch.ones(2, 3)


def inference_gradient(params, optimizer):
    with torch.inference_mode():
        inside = torch.ones(2, 3)
    params[1].grad = inside


def made_in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


def ones(*sizes, **options):
    return lambda old: torch.ones(*sizes, **options)


TENSORS = {
    # Gradients and parameters that do not fit each other.
    "float32 gradient of a float64 parameter": data(lambda d: d.double()),
    "float32 gradient of a bfloat16 parameter": data(lambda d: d.bfloat16()),
    "gradient of another shape": data(ones(4)),
    "gradient of another shape, as many elements": data(ones(3, 2)),
    "gradient that would broadcast over its parameter": data(ones(4, 2, 3)),
    "gradient with more dimensions than its parameter": data(ones(3)),
    "gradient transposed": grad(lambda p: torch.arange(6.0).view(3, 2).t()),
    "gradient expanded": grad(lambda p: torch.ones(1).expand(2, 3)),
    "gradient with a pending negation": grad(lambda p: torch._neg_view(torch.ones(2, 3))),
    "gradient of a conjugate": grad(lambda p: torch.view_as_complex(torch.ones(2, 3, 2)).conj().imag),
    "gradient sparse": grad(lambda p: torch.eye(2, 3).to_sparse()),
    "gradient with a graph": grad(lambda p: torch.ones(2, 3, requires_grad=True) * 2),
    "gradient of NaN": grad(lambda p: torch.full((2, 3), NAN)),
    "gradient of infinities": grad(lambda p: torch.full((2, 3), INF)),
    "gradient made in inference mode": inference_gradient,
    "gradient that is the parameter": grad_is_the_parameter,
    # Parameters.
    "parameter expanded": whole(lambda d: d[:1, :1].expand(2, 3)),
    "parameter with rows expanded": whole(lambda d: d[:1].expand(2, 3)),
    "parameter of overlapping windows": whole(lambda d: d.flatten().as_strided((2, 3), (1, 1))),
    "parameter with a pending negation": whole(lambda d: torch._neg_view(d)),
    "parameter of a conjugate": whole(lambda d: torch.view_as_complex(torch.ones(2, 3, 2)).conj().imag),
    "parameter transposed": whole(lambda d: d.reshape(3, 2).t()),
    "parameter sliced": whole(lambda d: torch.cat([d, d], 1)[:, ::2]),
    "parameter empty": whole(lambda d: d[:0]),
    "parameter a single number": whole(lambda d: torch.tensor(2.0)),
    "parameter int64": other_param(lambda: torch.nn.Parameter(torch.ones(2, 3, dtype=torch.long), requires_grad=False)),
    "parameter bool": other_param(lambda: torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bool), requires_grad=False)),
    "parameter complex64": whole(lambda d: d.to(torch.complex64)),
    "parameter complex32": whole(lambda d: d.to(torch.complex32)),
    "parameter complex128, conjugated": whole(lambda d: d.to(torch.complex128).conj()),
    "parameter float8": whole(lambda d: d.to(torch.float8_e4m3fn)),
    "parameter on meta": other_param(lambda: torch.nn.Parameter(torch.ones(2, 3, device="meta"))),
    "parameter that is no leaf": other_param(lambda: torch.ones(2, 3, requires_grad=True) * 1),
    "parameter that is a buffer": other_param(lambda: torch.ones(2, 3)),
    "parameter and gradient sparse": sparse,
    "parameter a view of a leaf": view_of_a_leaf,
    "parameter made in inference mode": inference_parameter,
    "parameters that share memory": views_of_one_storage,
    # States put there by hand.
    "state of another shape": states(ones(4)),
    "state of another shape, as many elements": states(ones(3, 2)),
    "state that would broadcast": states(ones(1, 3)),
    "state of one number": states(ones(())),
    "state too large": states(ones(4, 2, 3)),
    "state float64": states(lambda s: s.double()),
    "state float16": states(lambda s: s.half()),
    "state int64": states(lambda s: s.long()),
    "state complex": states(lambda s: s.to(torch.complex64)),
    "state on meta": states(lambda s: s.to("meta")),
    "state sparse": states(lambda s: s.to_sparse()),
    "state expanded": states(lambda s: torch.zeros(1).expand(2, 3)),
    "state transposed": states(lambda s: torch.zeros(3, 2).t()),
    "state with a pending negation": states(lambda s: torch._neg_view(torch.zeros(2, 3))),
    "state made in inference mode": states(made_in_inference_mode),
    "state that requires grad": states(lambda s: s.requires_grad_()),
    "state a number": states(lambda s: 0.5),
    "state None": states(lambda s: None),
    "state a NumPy array": states(lambda s: np.ones((2, 3), np.float32)),
    "state a list": states(lambda s: s.tolist()),
    "state of NaN": states(lambda s: torch.full_like(s, NAN)),
    "last state of another shape": last_state(ones(4)),
    "last state float64": last_state(lambda s: s.double()),
    "last state made in inference mode": last_state(made_in_inference_mode),
    "last state None": last_state(lambda s: None),
    "last state negative": last_state(lambda s: s - 5),
    "state that is the parameter": first_state_is_the_parameter,
    "state that is the gradient": first_state_is_the_gradient,
    "states shared by two parameters": share_state,
    "states None": own_state(lambda: None),
    "states empty": own_state(dict),
    "states a list": own_state(lambda: [1.0]),
    "states without their first": lambda p, o: [o.state[p[1]].pop(n, None) for n in ("exp_avg", "square_avg")],
    "states without a step": lambda p, o: o.state[p[1]].pop("step", None),
    "step a number": step(lambda s: 5.0),
    "step an int": step(lambda s: 5),
    "step of int64": step(lambda s: s.long()),
    "step of float64": step(lambda s: s.double()),
    "step of bfloat16": step(lambda s: s.bfloat16()),
    "step of one dimension": step(lambda s: s.view(1)),
    "step of two numbers": step(ones(2)),
    "step negative": step(lambda s: s - 8),
    "step NaN": step(lambda s: s * NAN),
    "step infinite": step(lambda s: s + INF),
    "step huge": step(lambda s: s + 1e9),
    "step made in inference mode": step(made_in_inference_mode),
    "step on meta": step(lambda s: s.to("meta")),
    "step None": step(lambda s: None),
    "step text": step(lambda s: "5"),
    "step shared": lambda p, o: "step" in o.state[p[1]] and o.state[p[1]].update(step=o.state[p[0]]["step"]),
}
