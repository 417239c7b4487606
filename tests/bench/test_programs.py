"""``benchmarks/programs.py``: whole training steps, torch beside fastopt."""

import re
import sys

import pytest
import torch
from torch import nn

import fastopt
import programs
import table
from paths import ROOT

OTHER = ROOT / "LICENSE"


@pytest.fixture
def one_step(monkeypatch):
    monkeypatch.setattr(programs, "MIN_STEPS", 2)


def test_library_finds_fastopts_names_before_torchs(monkeypatch):
    assert programs.FASTOPT.AdamW is fastopt.AdamW
    assert programs.FASTOPT.cross_entropy is fastopt.functional.cross_entropy
    assert programs.TORCH.AdamW is torch.optim.AdamW
    assert programs.TORCH.cross_entropy is nn.functional.cross_entropy
    monkeypatch.setattr(fastopt.functional, "l1_loss", print, raising=False)
    assert (programs.FASTOPT.l1_loss, programs.FASTOPT.Rprop) == (print, torch.optim.Rprop)


def test_programs_run_and_their_table_goes_between_the_markers(one_step, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("above\n{}\nold\n{}\nbelow\n".format(*programs.MARKERS))
    assert programs.main(["PPO", "tabular", "LeNet", "--seconds", "0", "--readme", str(readme)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| program | whole step, ms: torch, fastopt | ratio | p10-p90 | forward + loss, ms |")
    both = r"[\d.]+, [\d.]+"
    row = rf"\| PPO update, 2 x 64 units \| {both} \| \*\*[\d.]+x\*\* \| [\d.]+-[\d.]+ (\| {both} ){{5}}\|"
    assert re.fullmatch(row, lines[2])
    assert len(lines) == 5
    text = readme.read_text()
    assert text.startswith(f"above\n{programs.MARKERS[0]}\n")
    assert text.endswith("\n".join([lines[-1], programs.MARKERS[1], "below\n"]))
    assert ". `python benchmarks/programs.py PPO tabular LeNet --seconds 0`\n" in text
    assert "old" not in text


def test_a_step_takes_its_parts_in_their_order():
    happened = []

    class Optimizer(torch.optim.SGD):
        def step(self):
            happened.append("step")

        def zero_grad(self):
            happened.append("zero")

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(ctx, grad):
            happened.append("backward")
            return grad.expand(1, 1)

    def loss(model, library):
        happened.append("forward + loss")
        return Loss.apply(model.weight)

    library = programs.Library(nn.Module)
    library.SGD, library.clip_grad_norm_ = Optimizer, lambda params, max_norm: happened.append("clip")
    program = programs.Program("small", None, "SGD", max_norm=1.0)
    training = programs.Training(program, library, nn.Linear(1, 1, bias=False), loss)
    training.step()
    assert tuple(happened) == programs.PARTS
    assert len(training.seconds[0]) == len(programs.PARTS)
    assert min(training.seconds[0]) > 0


def test_losses_that_disagree_are_status_1(one_step, monkeypatch, capsys):
    def wrong(*args, **options):
        return 1.1 * nn.functional.cross_entropy(*args, **options)

    monkeypatch.setattr(fastopt.functional, "cross_entropy", wrong)
    assert programs.main(["tabular", "--seconds", "0"]) == 1
    assert "| tabular MLP, batch of 128 | wrong: the loss must be torch's, " in capsys.readouterr().out


def test_program_without_transformers_is_reported_as_not_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert programs.main(["GPT-2", "Llama", "--seconds", "0"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "| GPT-2 of 4 layers, 50 k classes | not run",
        "| Llama of 4 layers, 32 k classes, bf16 | not run",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unknown"], "argument NAME: must be part of a program's name, got ['unknown']"),
        (["--threads", "0"], "argument --threads: must be >= 1, got 0"),
        (["--seconds", "-1"], "argument --seconds: must be >= 0 and finite, got -1"),
        (["--readme", "absent"], "argument --readme: absent: "),
        (["--readme", str(OTHER)], f"argument --readme: {OTHER}: must hold <!-- programs:begin --> and after it"),
    ],
)
def test_bad_argument_is_named_with_rule_and_value(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        programs.main(arguments)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_page_of_benchmarks_contains_the_markers_of_both_tables():
    page = ROOT / "docs/benchmarks.md"
    text = page.read_text(encoding="utf-8")
    for markers in (programs.MARKERS, table.MARKERS):
        assert "new" in table.rewrite_between_markers(text, "new", markers)
