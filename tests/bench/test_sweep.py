"""``benchmarks/sweep.py``: its rows, the rows that count as slow, and its exit status."""

import random
import time
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

import fastopt
import sweep
from fastopt.bench import cases, providers, tables
from sweep import Times

# Rows.

EVERY = list(sweep.sweep_rows())
NAMES = [row.name for row in EVERY]


def row_of(name):
    return EVERY[NAMES.index(name)]


def test_every_optimizer_and_loss_of_fastopt_has_rows_in_every_dtype():
    functions = {
        name: value for name, value in vars(fastopt.functional).items() if hasattr(F, name) and callable(value)
    }
    ours = {name for name, value in functions.items() if value.__module__.startswith("fastopt")}
    assert ours >= {"cross_entropy"}
    dtypes = {}
    for row in EVERY:
        name = (row.loss if row.kind == "loss" else row.optimizer).name
        dtypes.setdefault(name, set()).add(row.dtype)
    in_torch = [name for name in fastopt.optim.__all__ if hasattr(torch.optim, name)]
    assert dtypes == dict.fromkeys([*ours, *in_torch], set(cases.DTYPES))


def test_row_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)
    assert "cross-entropy 64 x 10 f16, half ignored" in NAMES
    assert "Adam amsgrad: LeNet, 44 k f64" in NAMES
    assert not any("x 10 x 2, transposed" in name for name in NAMES)


@pytest.mark.parametrize(
    ("name", "n_bytes"),
    [
        ("SGD: LeNet, 44 k", 3 * 4 * 44_426),
        ("Adam amsgrad: LeNet, 44 k bf16", 9 * 2 * 44_426),
        ("RMSprop momentum=0.9 centered: one of 10 f64", 9 * 8 * 10),
        ("cross-entropy 64 x 10", 4 * 640 + 8 * 64 + 4 * 640),
        ("cross-entropy 64 x 10 f64, probabilities", 3 * 8 * 640),
        ("cross-entropy 64 x 10 bf16, half ignored", 2 * 320 + 8 * 64 + 2 * 640),
        ("cross-entropy 1024 x 10 x 2 f16, no gradient", 2 * 20480 + 8 * 2048),
    ],
)
def test_bytes_of_a_row_are_those_worked_out_by_hand(name, n_bytes):
    assert row_of(name).bytes_moved == n_bytes


def test_a_new_loss_is_one_row(monkeypatch):
    monkeypatch.setattr(tables, "LOSSES", (tables.Loss("l1_loss", variants=({}, dict(reduction="sum"))),))
    monkeypatch.setattr(fastopt.functional, "l1_loss", F.l1_loss, raising=False)
    found = [row for row in sweep.sweep_rows() if row.kind == "loss"]
    assert len(found) == 2 * len(sweep.SHAPES) * len(cases.DTYPES)
    assert found[0].name == "l1-loss 1 x 10"
    assert found[-1].name == "l1-loss 2 x 19 x 256 x 256 f16, reduction=sum"
    assert found[0].bytes_moved == 3 * 40
    for call in sweep.calls_of(found[0]).values():
        call()


def test_optimizer_with_nothing_in_torch_beside_it_has_no_row(monkeypatch):
    monkeypatch.setattr(tables, "OPTIMIZERS", (tables.Optimizer("Lion"),))
    assert not [row for row in sweep.sweep_rows() if row.kind == "optimizer"]


def test_drawn_rows_are_those_of_their_seed():
    def names(seed):
        return [row.name for row in sweep.sweep_rows(random.Random(seed), (torch.float32,))]

    assert names(1) == names(1)
    assert not set(names(1)) & set(names(2))
    assert max(row.bytes_moved for row in sweep.sweep_rows(random.Random(3))) < 1e9


def test_drawn_rows_are_of_every_optimizer_and_loss():
    def prefixes(names):
        return {name.split(":")[0].split(" ")[0] for name in names}

    assert prefixes(row.name for row in sweep.sweep_rows(random.Random(1))) == prefixes(NAMES)


SMALL = ("one of 10", "1 x 10", "16 x 10 x 2", "64 x 2")


@pytest.mark.parametrize(
    "row", [row for row in EVERY if any(size in row.name for size in SMALL)], ids=lambda row: row.name
)
def test_calls_of_a_row_work_and_differ_by_their_provider(row):
    calls = sweep.calls_of(row)
    assert "fastopt" in calls
    assert "torch for-loop" in calls or "torch" in calls
    for call in calls.values():
        call()


def test_losses_get_the_layout_and_options_of_their_row(monkeypatch):
    seen = []

    def spy(inputs, target, **options):
        seen.append((inputs.stride(), target.shape, inputs.requires_grad, sorted(options)))
        return F.cross_entropy(inputs, target, **options)

    monkeypatch.setattr(F, "cross_entropy", torch.nn.functional.cross_entropy)
    monkeypatch.setattr(fastopt.functional, "cross_entropy", spy)
    for name in ("transposed", "rows apart", "probabilities", "weight", "no gradient", "reduction=none"):
        sweep.calls_of(row_of(f"cross-entropy 64 x 10, {name}"))
    sweep.calls_of(row_of("cross-entropy 4 x 21 x 64 x 64, channels_last"))
    assert [call for call in seen if call != ((10, 1), (64,), False, ["reduction"])] == [
        ((1, 64), (64,), True, []),
        ((20, 1), (64,), True, []),
        ((10, 1), (64, 10), True, []),
        ((10, 1), (64,), True, ["weight"]),
        ((10, 1), (64,), False, []),
        ((10, 1), (64,), True, ["reduction"]),
        ((21 * 64 * 64, 1, 64 * 21, 21), (4, 64, 64), True, []),
    ]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_step_that_changes_few_parameters_is_not_timed(share, monkeypatch):
    """torch 2.13's fused SGD updates a few elements of 16-bit tensors."""
    loop = providers.OPTIMIZERS[0]

    def partly(case, params):
        n = round(share * params[0].numel())
        return lambda: params[0].data.view(-1)[:n].add_(1)

    ours = providers.Provider("fastopt", loop.make)
    monkeypatch.setattr(providers, "OPTIMIZERS", (loop, providers.Provider("torch partly", partly), ours))
    row = cases.OptimizerCase(tables.OPTIMIZERS[0], "SGD: small", ((10, 10),))
    assert list(sweep.calls_of(row)) == ["torch for-loop", *["torch partly"] * (share == 1), "fastopt"]


# Slow rows, and how they are reported.


@pytest.mark.parametrize(
    ("us", "is_slow"),
    [
        (dict(fastopt=100.0, torch=96.0), False),
        (dict(fastopt=100.0, torch=94.0), True),
        (dict(fastopt=10.0, torch=8.5), False),  # less than 2 us
        ({"fastopt": 100.0, "torch for-loop": 300.0, "torch fused": 90.0, "copy": 1.0}, True),
        ({"fastopt": 100.0, "torch for-loop": 300.0, "torch fused": 120.0, "copy": 1.0}, False),
    ],
)
def test_a_row_is_slow_beside_the_fastest_torch(us, is_slow):
    assert Times(us).is_slow == is_slow
    assert Times(us).ratio == min(value for name, value in us.items() if "torch" in name) / us["fastopt"]


@dataclass
class Row:
    """A row whose fastopt sleeps."""

    name: str
    seconds: tuple  # of each making
    bytes_moved: int = 4096
    made: list = field(default_factory=list)

    def calls(self):
        self.made.append(self.seconds[min(len(self.made), len(self.seconds) - 1)])
        seconds = self.made[-1]
        return {"torch": lambda: time.sleep(1e-3), "fastopt": lambda: time.sleep(seconds)}


SLOW, ONCE_SLOW, FAST = 4e-3, (4e-3, 1e-5), 1e-5


@pytest.fixture
def short_repeats(monkeypatch):
    monkeypatch.setattr(sweep, "calls_of", lambda row: row.calls())
    monkeypatch.setattr(sweep, "MAX_ROW_S", 0.02)
    monkeypatch.setattr(sweep, "AGAIN_S", 0.02)
    monkeypatch.setattr(sweep, "N_ROUNDS_AGAIN", 3)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.timed
def test_only_what_is_slow_each_time_is_printed_with_its_bytes(short_repeats, two_threads, monkeypatch, capsys):
    table = [Row("slow", (SLOW,)), Row("once slow", ONCE_SLOW), Row("fast", (FAST,))]
    monkeypatch.setattr(sweep, "sweep_rows", lambda rng: table)
    assert sweep.main(["--seconds", "9", "--threads", "1"]) == 1
    assert torch.get_num_threads() == 2
    slower, summary = capsys.readouterr().out.splitlines()
    assert slower.startswith("SLOWER 0.")
    assert "  slow, 1 thread: fastopt 4," in slower
    assert " us, torch 1," in slower
    assert "; 4,096 B at 0.0 GB/s, a plain copy's at " in slower
    assert summary.startswith("2 of 3 rows at least as fast as torch; worst 0.")
    assert summary.endswith("x: slow, 1 thread")
    assert [len(row.made) for row in table] == [3, 2, 1]


@pytest.mark.timed
def test_nothing_slow_is_success_on_all_threads_and_on_one(short_repeats, two_threads, monkeypatch, capsys):
    table = [Row("a fast one", (FAST,)), Row("another", (FAST,)), Row("other", (FAST,), 10**9)]
    monkeypatch.setattr(sweep, "sweep_rows", lambda rng: table)
    assert sweep.main(["--quick", "--seconds", "0.1", "--only", "OTHER"]) == 0
    (summary,) = capsys.readouterr().out.splitlines()
    assert summary.startswith("2 of 2 rows at least as fast as torch; worst ")
    assert [len(row.made) for row in table] == [0, 2, 0]


def test_a_row_is_chosen_by_its_name_as_it_is_printed(two_threads, monkeypatch):
    chosen = []
    monkeypatch.setattr(sweep, "_sweep", lambda pairs, seconds: chosen.extend(pairs) or 0)
    table = [Row("a", (FAST,)), Row("another", (FAST,))]
    monkeypatch.setattr(sweep, "sweep_rows", lambda rng: table)
    assert sweep.main(["--only", "another, 2 threads"]) == 0
    assert chosen == [("another, 2 threads", table[1], 2)]


def test_what_the_time_does_not_reach_is_counted_and_is_drawn_at_random(short_repeats, monkeypatch, capsys):
    table = [Row(f"row {index}", (FAST,)) for index in range(50)]
    monkeypatch.setattr(sweep, "sweep_rows", lambda rng: table)
    assert sweep.main(["--seconds", "0", "--threads", "1"]) == 0
    assert "1 of 1 rows at least as fast as torch, 49 not reached in 0 s; worst" in capsys.readouterr().out
    for seed in range(5):
        assert sweep.main(["--seconds", "0", "--threads", "1", "--seed", str(seed)]) == 0
    assert sum(bool(row.made) for row in table) > 2


def test_row_that_raises_is_reported_with_status_3(short_repeats, monkeypatch, capsys):
    def fail():
        raise RuntimeError("no kernel")

    table = [Row("fast", (FAST,)), Row("broken", ())]
    table[1].calls = fail
    monkeypatch.setattr(sweep, "sweep_rows", lambda rng: table)
    assert sweep.main(["--seconds", "0.1", "--threads", "1"]) == 3
    out = capsys.readouterr().out
    assert "NOT RUN broken, 1 thread: RuntimeError: no kernel" in out
    assert "1 of 1 rows at least as fast as torch, 1 not run; worst" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such row"], "argument --only: must be part of a row's name (see --list), got 'no such row'"),
        (["--seed", "-1"], "argument --seed: must be >= 0, got -1"),
        (["--seconds", "nan"], "argument --seconds: must be >= 0 and finite, got nan"),
    ],
)
def test_bad_argument_is_named_with_rule_and_value(arguments, message, capsys):
    with pytest.raises(SystemExit) as exited:
        sweep.main([*arguments])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_help_states_the_threshold_and_list_the_bytes(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    assert "torch's time / 0.95, and over 2 us more" in " ".join(capsys.readouterr().out.split())
    assert sweep.main(["--list", "--only", "64 x 10 bf16, weight"]) == 0
    assert capsys.readouterr().out == "cross-entropy 64 x 10 bf16, weight  (3,072 B)\n"


@pytest.mark.timed
def test_sweep_of_real_rows_ends_within_its_time(capsys):
    started = time.monotonic()
    assert sweep.main(["--quick", "--seconds", "1", "--seed", "5"]) in (0, 1)
    assert time.monotonic() - started < 30
    assert " rows at least as fast as torch" in capsys.readouterr().out.splitlines()[-1]
