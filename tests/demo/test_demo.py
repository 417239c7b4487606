"""``python -m fastopt demo`` from its arguments to its table, picture, JSON and exit status."""

import functools
import io
import json
import subprocess
import sys

import pytest
import torch

import fastopt
from fastopt.__main__ import main
from fastopt.demo import data, models, report, train
from paths import child_environment

QUICK = ["demo", "--model", "lenet", "--steps", "4", "--batch-size", "16", "--quiet"]


pytestmark = pytest.mark.usefixtures("few_drawn_digits")

# The demo, end to end.


@pytest.mark.slow
def test_demo_writes_table_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    files = ["--json", "out.json", "--png", "out.png"]
    options = ["--model", "lenet", "--steps", "6", "--batch-size", "32", "--threads", "2", "--seed", "3"]
    command = [sys.executable, "-m", "fastopt", "demo", *options, *files]
    ran = subprocess.run(command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Parity holds." in ran.stdout
    assert "fastopt_acc_%" in ran.stdout
    assert "default (for-loop)" in ran.stdout
    assert "adam: 6/6 steps" in ran.stderr
    assert "\r" not in ran.stderr  # no bar where there is no terminal

    reported = json.loads((tmp_path / "out.json").read_text())
    assert reported["parity"] is True
    assert reported["config"] == {
        "model": "lenet",
        "steps": 6,
        "batch_size": 32,
        "lr": None,
        "seed": 3,
        "device": "cpu",
        "stock": "default",
    }
    assert reported["threads"] == 2
    assert reported["versions"]["torch"] == torch.__version__
    assert reported["fastopt"]["backend"]
    assert reported["data"]["source"] == "digits drawn by fastopt"
    assert [result["optimizer"] for result in reported["results"]] == list(train.OPTIMIZERS)
    for result in reported["results"]:
        for side in ("torch", "fastopt"):
            assert len(result[side]["losses"]) == 6
            assert all(0 < loss < 10 for loss in result[side]["losses"])
            assert all(len(times) == 6 and min(times) > 0 for times in result[side]["times_ms"].values())
            assert 0 <= result[side]["accuracy_percent"] <= 100
        assert result["torch"]["losses"][0] == pytest.approx(result["fastopt"]["losses"][0], rel=1e-5)
        medians = [result[side]["median_ms"] for side in ("torch", "fastopt")]
        assert medians[0]["step"] == pytest.approx(sum(medians[0][part] for part in train.PARTS))
        assert result["speedup"]["step"] == pytest.approx(medians[0]["step"] / medians[1]["step"])

    picture = (tmp_path / "out.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 30_000


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_each_optimizer_keeps_parity_on_the_cnn(optimizer, capsys):
    assert main(["demo", "--optimizer", optimizer, "--steps", "3", "--batch-size", "16", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "model      cnn" in out
    assert f"\n{optimizer} " in out


@pytest.mark.parametrize(
    ("stock", "optimizer", "named"),
    [
        ("default", "adam", "default (for-loop)"),
        ("foreach", "adam", "foreach"),
        ("fused", "adam", "fused"),
        ("fused", "rmsprop", "foreach (no fused)"),
    ],
)
def test_stock_implementation_is_the_one_asked_for_and_is_named(stock, optimizer, named, monkeypatch):
    seen = []
    cls = getattr(torch.optim, train.OPTIMIZERS[optimizer].name)
    initialize = cls.__init__

    @functools.wraps(initialize)
    def spy(self, params, **arguments):
        seen.append((type(self), arguments))
        initialize(self, params, **arguments)

    monkeypatch.setattr(cls, "__init__", spy)
    config = train.Config("lenet", steps=1, batch_size=4, stock=stock)
    outcome = train.compare(optimizer, config, data.draw())
    assert outcome.stock_implementation == named
    chosen = next(arguments for kind, arguments in seen if kind is cls)
    assert chosen.get("foreach") == (True if "foreach" in named.split() else None)
    assert chosen.get("fused") == (True if named == "fused" else None)


def test_same_seed_gives_the_same_torch_losses_and_another_seed_does_not():
    config, digits = train.Config("lenet", steps=3, batch_size=8), data.draw()

    def losses(seed):
        return train.compare("adam", train.Config("lenet", steps=3, batch_size=8, seed=seed), digits).torch["losses"]

    assert losses(config.seed) == losses(config.seed)
    assert losses(config.seed) != losses(1)


def test_sides_take_turns_and_see_the_same_batches(monkeypatch):
    seen = []
    step = train.Side.step

    def spy(self, images, labels, clock):
        seen.append((isinstance(self.loss, fastopt.CrossEntropyLoss), images.clone(), labels.clone()))
        return step(self, images, labels, clock)

    monkeypatch.setattr(train.Side, "step", spy)
    train.compare("sgd", train.Config("lenet", steps=3, batch_size=8), data.draw())
    assert [ours for ours, *_ in seen] == [False, True, True, False, False, True]
    for (_, images, labels), (_, other_images, other_labels) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    assert not torch.equal(seen[0][1], seen[2][1])


def test_batches_cover_every_image_once_per_epoch():
    rows = list(train._batches(10, train.Config(steps=6, batch_size=3)))
    assert all(len(batch) == 3 for batch in rows)
    for epoch in (rows[:3], rows[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 9
    assert rows[0].tolist() != rows[3].tolist()


def test_epochs_are_turned_into_steps(tmp_path):
    assert main([*QUICK[:3], "--quiet", "--batch-size", "300", "--epochs", "3", "--json", "out.json"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["config"]["steps"] == 3 * (data.N_DRAWN_TRAIN // 20 // 300)


def test_picture_without_matplotlib_is_one_line_and_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*QUICK, "--optimizer", "sgd", "--png", "out.png"]) == 0
    assert "no picture, for there is no matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_models_have_the_stated_sizes():
    n_params = {name: sum(p.numel() for p in models.build(name, 0).parameters()) for name in models.MODELS}
    assert n_params == {"cnn": 1_199_882, "lenet": 44_426}


def test_weights_come_from_the_seed_alone():
    def first_weight(seed):
        return next(models.build("lenet", seed).parameters())

    before = torch.random.get_rng_state()
    weight = first_weight(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(first_weight(0), weight)
    assert not torch.equal(first_weight(1), weight)


# Bad arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be >= 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid integer value: 'many'"),
        (["--epochs", "-1"], "argument --epochs: must be >= 1, got -1"),
        (["--epochs", "1", "--steps", "1"], "not allowed with argument"),
        (["--batch-size", "0"], "argument --batch-size: must be >= 1, got 0"),
        (["--batch-size", "601"], "argument --batch-size: must be at most the 600 training images, got 601"),
        (["--lr", "-0.1"], "argument --lr: must be >= 0 and finite, got -0.1"),
        (["--lr", "nan"], "argument --lr: must be >= 0 and finite, got nan"),
        (["--lr", "fast"], "argument --lr: must be >= 0 and finite, got fast"),
        (["--seed", "-1"], "argument --seed: must be >= 0, got -1"),
        (["--threads", "0"], "argument --threads: must be >= 1, got 0"),
        (["--data", "absent"], "argument --data: must be a directory, got 'absent'"),
        (["--json", "absent/file"], "argument --json: must be a file in a directory that exists, got 'absent/file'"),
        (["--png", "."], "argument --png: must be a file in a directory that exists, got '.'"),
        (["--device", "tpu"], "argument --device: must be cpu or cuda, got 'tpu'"),
        (["--device", "meta"], "argument --device: must be cpu or cuda, got 'meta'"),
        (["--device", "cuda:99"], "CUDA devices, got 'cuda:99'"),
        (["--optimizer", "unknown"], "argument --optimizer: invalid choice: 'unknown'"),
    ],
)
def test_bad_argument_is_named_with_rule_and_value(arguments, message, capsys):
    with pytest.raises(SystemExit) as exited:
        main([*QUICK, *arguments])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_without_digits_is_an_error_before_any_training(tmp_path, capsys):
    assert main([*QUICK, "--data", str(tmp_path)]) == 2
    assert f"error: --data: no IDX files such as train-images-idx3-ubyte[.gz] in {tmp_path}" in capsys.readouterr().err


# Small parts.


def test_progress_is_a_bar_on_a_terminal_and_four_lines_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, plain, silent = Terminal(), io.StringIO(), io.StringIO()
    for stream, quiet in ((terminal, False), (plain, False), (silent, True)):
        progress = report.Progress("adam", 100, quiet=quiet, stream=stream)
        for _ in range(100):
            progress.step()
    assert terminal.getvalue().startswith("\radam")
    assert "[" + "#" * 30 + "] 100/100 steps" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")
    assert [line.split(",")[0] for line in plain.getvalue().splitlines()] == [
        f"adam: {n}/100 steps" for n in (25, 50, 75, 100)
    ]
    assert silent.getvalue() == ""


def test_medians_leave_the_warm_up_out():
    assert train._median([100.0] * 5 + [1.0, 3.0, 2.0, 1.0, 9.0]) == 2.0
    assert train._median([100.0, 1.0]) == 1.0
    assert train._median([7.0]) == 7.0


def test_smoothed_curve_starts_at_the_first_loss_and_follows_a_constant():
    assert report._smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert report._smooth([4.0, 0.0])[0] == 4.0


def test_columns_of_a_table_line_up():
    table = report._aligned([("name", "ms"), ("a", "10.5"), ("longer", "1.0")], 1)
    assert table == "name      ms\na       10.5\nlonger   1.0"
