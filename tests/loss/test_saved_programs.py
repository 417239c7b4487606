"""Saved and exported programs with the loss: which of them need fastopt where they are loaded."""

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

import fastopt
from common import is_native, kernel_calls
from paths import ROOT, child_environment

X, T = torch.linspace(-1, 1, 40).view(4, 10).sin(), torch.tensor([0, 9, 3, 5])


class Model(torch.nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(10, 10)
        self.loss = fastopt.CrossEntropyLoss(torch.linspace(1, 2, 10), label_smoothing=0.1, reduction=reduction)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.loss(self.layer(x), t)


class Rows(torch.nn.Module):
    """An image's loss of each position, in place where that can be."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return fastopt.functional.cross_entropy(
            (x * 2).view(2, 10, 2), t.view(2, 2), reduction="none", inplace_backward=True
        )


MODELS = {"model": Model, "rows": Rows}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def use_eagerly():
    fastopt.functional.cross_entropy(X.clone().requires_grad_(), T).backward()
    torch.ops.fastopt.cross_entropy(X, T)


def in_a_process_of_its_own(program, *arguments, imports_fastopt=False):
    program = ("import fastopt\n" if imports_fastopt else "") + textwrap.dedent(program)
    program += "\nprint('with fastopt' if 'fastopt' in __import__('sys').modules else 'without fastopt')"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=child_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


LOAD = """
    import sys, torch

    for kind in sys.argv[2:]:
        x, t, loss, grad = torch.load(f"{sys.argv[1]}/{kind}.expected")
        x.requires_grad_()
        path = f"{sys.argv[1]}/{kind}.pt2"
        found = (torch.export.load(path).module() if "exported" in kind else torch.jit.load(path))(x, t)
        found.sum().backward()
        torch.testing.assert_close(found.detach(), loss)
        torch.testing.assert_close(x.grad, grad)
"""


def expected_of(model, path):
    x = X.clone().requires_grad_()
    loss = model(x, T)
    loss.sum().backward()
    torch.save((X, T, loss.detach(), x.grad), path)


def save_exported(model, path):
    torch.export.save(torch.export.export(model, (X, T)), path)


def save_strictly_exported(model, path):
    torch.export.save(torch.export.export(model, (X, T), strict=True), path)


def save_exported_for_inference(model, path):
    torch.export.save(torch.export.export(model, (X, T)).run_decompositions(), path)


def save_traced(model, path):
    torch.jit.trace(model, (X, T)).save(str(path))


def save_traced_without_gradients(model, path):
    with torch.no_grad():
        torch.jit.trace(model.eval(), (X, T)).save(str(path))


SAVE = {
    "exported": save_exported,
    "strictly exported": save_strictly_exported,
    "exported for inference": save_exported_for_inference,
    "traced": save_traced,
    "traced without gradients": save_traced_without_gradients,
}


def save_all(folder):
    """Of each model each kind of program, and then what it computes."""
    kinds = []
    for name, make in MODELS.items():
        for kind, save in SAVE.items():
            kinds.append(f"{name} {kind}")
            save(make(), f"{folder}/{kinds[-1]}.pt2")
    for kind in kinds:
        expected_of(MODELS[kind.split()[0]](), f"{folder}/{kind}.expected")


KINDS = [f"{name} {kind}" for name in MODELS for kind in SAVE]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_fresh", [True, False], ids=["in a fresh process", "after eager losses"])
def test_saved_programs_load_where_fastopt_is_not_imported(is_fresh, tmp_path):
    """The kernels' library, once an eager loss has loaded it, takes the place of what could be traced."""
    if is_fresh:
        program = (
            "import sys; sys.path.insert(0, 'tests/loss'); import test_saved_programs as t; t.save_all(sys.argv[1])"
        )
        result = in_a_process_of_its_own(program, tmp_path)
        assert result.stdout == "with fastopt\n", result.stderr[-2000:]
    else:
        use_eagerly()
        save_all(tmp_path)
    result = in_a_process_of_its_own(LOAD, tmp_path, *KINDS)
    assert result.stdout == "without fastopt\n", result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_saved_script_needs_fastopt_and_runs_its_kernel(tmp_path):
    """A script keeps the operator, so that the kernels run."""
    for name, make in MODELS.items():
        scripted = torch.jit.script(make())
        before = kernel_calls("cross_entropy")
        scripted(X, T)
        assert kernel_calls("cross_entropy") == before + is_native()
        scripted.save(str(tmp_path / f"{name} scripted.pt2"))
        expected_of(make(), tmp_path / f"{name} scripted.expected")
    kinds = [f"{name} scripted" for name in MODELS]
    with_fastopt = in_a_process_of_its_own(LOAD, tmp_path, *kinds, imports_fastopt=True)
    assert with_fastopt.stdout == "with fastopt\n", with_fastopt.stderr[-2000:]
    without = in_a_process_of_its_own(LOAD, tmp_path, *kinds)
    assert without.returncode != 0
    assert "fastopt::cross_entropy" in without.stderr


@pytest.mark.filterwarnings("ignore")
@models
def test_graphs_hold_torchs_operators_only(make):
    use_eagerly()
    for is_strict in (False, True):
        exported = torch.export.export(make(), (X, T), strict=is_strict)
        for program in (exported, exported.run_decompositions()):
            targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert targets
            assert all("aten." in target or "getitem" in target for target in targets), targets
    traced = torch.jit.trace(make(), (X, T))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::cross_entropy_loss" in kinds
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds)


@pytest.mark.filterwarnings("ignore")
@models
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_exporters_give_the_loss(make, dynamo, tmp_path):
    needed = ("onnx", "onnxscript") if dynamo else ("onnx",)
    if not all(map(importlib.util.find_spec, needed)):
        pytest.skip(f"needs {' and '.join(needed)}")
    use_eagerly()
    path, model = tmp_path / "model.onnx", make().eval()
    if not dynamo and make is Model:
        model.loss.label_smoothing = 0.0  # which torch's tracing exporter does not know
    torch.onnx.export(model, (X, T), str(path), dynamo=dynamo, input_names=["x", "t"], verbose=False)
    assert b"fastopt::" not in path.read_bytes()
