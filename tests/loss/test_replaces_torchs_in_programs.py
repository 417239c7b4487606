"""torch.nn.functional.cross_entropy replaced by ours in models that are compiled, traced, exported or scripted."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import fastopt
from loss_cases import loss_and_grad, make_values

ORIGINAL = F.cross_entropy
cross_entropy = fastopt.functional.cross_entropy
X, T = make_values((6, 10), scale=1.0), torch.tensor([0, 9, 3, 2, 5, 5])
P = torch.softmax(make_values((6, 10), seed=3), 1)


class Model(torch.nn.Module):
    """Calls torch's function by its name, as a language model does that computes its own loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(10, 10)

    def forward(self, x: torch.Tensor, t: torch.Tensor):
        logits = self.layer(x)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), t.view(-1), ignore_index=5)


def trained(model, run=lambda call: call()):
    """Losses and parameters of three steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    forward = getattr(model, "compiled", model)
    for _ in range(3):
        loss = run(lambda: forward(X, T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def expected():
    assert F.cross_entropy is ORIGINAL
    return trained(Model())


COMPILERS = {
    "eager": dict(backend="eager"),
    "aot_eager": dict(backend="aot_eager"),
    "whole graph": dict(backend="aot_eager", fullgraph=True),
    "dynamic": dict(backend="aot_eager", dynamic=True),
    "inductor": dict(backend="inductor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [pytest.param(COMPILERS[n], marks=[pytest.mark.slow] * (n == "inductor"), id=n) for n in COMPILERS]
)
@pytest.mark.parametrize("amp", [False, True])
def test_a_compiled_model_that_calls_torchs_function_trains(options, amp, expected, replaced):
    model = Model()
    object.__setattr__(model, "compiled", torch.compile(model, **options))

    def run(call):
        with torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext():
            return call()

    torch.testing.assert_close(trained(model, run), expected, **(dict(rtol=5e-2, atol=5e-2) if amp else {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_the_replaced_function_itself_is_compiled(name, replaced):
    legacy = [{"size_average": a, "reduce": b} for a in (None, True, False) for b in (None, True, False)]
    options_of_indices = [{}, {"reduction": "none"}, *legacy]
    for target, options in ((P, {"label_smoothing": 0.1}), *((T, options) for options in options_of_indices)):
        torch.compiler.reset()  # so many would exceed its limit
        compiled = torch.compile(replaced, backend=name, fullgraph=True)
        theirs = loss_and_grad(ORIGINAL, X, target, **options)
        torch.testing.assert_close(loss_and_grad(compiled, X, target, **options), theirs)


@pytest.mark.filterwarnings("ignore")
def test_torchs_module_is_compiled_traced_and_exported(replaced):
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = ORIGINAL(X, T, label_smoothing=0.1)
    programs = [
        torch.compile(loss, backend="aot_eager", fullgraph=True),
        torch.jit.trace(loss, (X, T)),
        torch.export.export(loss, (X, T)).module(),
        torch.export.export(loss, (X, T), strict=True).module(),
        torch.fx.symbolic_trace(loss),
    ]
    for program in programs:
        torch.testing.assert_close(program(X, T), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_scripted(monkeypatch, expected):
    """The compiler of scripts looks the name up in torch.nn.functional, and compiles what it finds."""
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    scripted = torch.jit.script(Model())
    torch.testing.assert_close(trained(scripted), expected)
    loss = torch.jit.script(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    torch.testing.assert_close(loss(X, T), ORIGINAL(X, T, label_smoothing=0.1))
