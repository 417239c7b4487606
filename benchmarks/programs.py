"""Whole training steps of small programs of common kinds: torch beside fastopt, which take turns step by step.

    python benchmarks/programs.py [NAME...] [--seconds 8] [--threads N] [--readme docs/benchmarks.md]

Both train copies of one model on one batch with torch's defaults. The losses of the first steps must agree; then each
part of a step is timed. Exits with 1 if losses disagree. Programs that need transformers are not run without it.
"""

import argparse
import copy
import functools
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import fastopt
from fastopt._arguments import at_least, non_negative
from fastopt.bench import machine, measure
from table import readme_with, rewrite_between_markers

MARKERS = "<!-- programs:begin -->", "<!-- programs:end -->"
PARTS = "forward + loss", "backward", "clip", "step", "zero"
HEADS = "program", "whole step, ms: torch, fastopt", "ratio", "p10-p90", *(f"{part}, ms" for part in PARTS)
N_CHECKED_STEPS, MIN_STEPS, TOLERANCE = 3, 12, 2e-2


class Library:
    """Functions and classes by torch's names, from the first module that has them."""

    def __init__(self, *modules):
        self._modules = modules

    def __getattr__(self, name):
        return next(getattr(module, name) for module in self._modules if hasattr(module, name))


_TORCH = F, torch.optim, nn.utils
TORCH, FASTOPT = Library(*_TORCH), Library(fastopt.functional, fastopt, *_TORCH)


@dataclass(frozen=True)
class Program:
    name: str
    make: object  # () -> (model, loss): loss(model, library) is a scalar
    optimizer: str
    options: dict = field(default_factory=dict)
    max_norm: float | None = None  # of the gradient


def _heads(n_outputs):
    layers = nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n_outputs)
    return nn.Sequential(*layers)


def _ppo():
    """An update of proximal policy optimization: the clipped objective and the loss of the value."""
    model = nn.ModuleDict(dict(policy=_heads(4), value=_heads(1)))
    states, actions, returns = torch.randn(64, 8), torch.randint(4, (64,)), torch.randn(64)

    def loss(model, library):
        log_prob = -library.cross_entropy(model["policy"](states), actions, reduction="none")
        ratio = (log_prob - log_prob.detach()).exp()
        objective = torch.min(ratio * returns, ratio.clamp(0.8, 1.2) * returns).mean()
        return 0.5 * library.mse_loss(model["value"](states).squeeze(-1), returns) - objective

    return model, loss


def _classifier(model, inputs, n_classes):
    target = torch.randint(n_classes, inputs.shape[:1])
    return model, lambda model, library: library.cross_entropy(model(inputs), target)


def _tabular():
    layers = nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    return _classifier(nn.Sequential(*layers), torch.randn(128, 32), 10)


def _lenet():
    features = (
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
    )
    classes = nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)
    return _classifier(nn.Sequential(*features, *classes), torch.randn(64, 1, 28, 28), 10)


def _next_token(model, logits_of, tokens):
    def loss(model, library):
        logits = logits_of(model, tokens[:, :-1])
        return library.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


def _char_gpt():
    n_characters, width = 65, 128
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(n_characters, width), blocks, nn.Linear(width, n_characters))
    return _next_token(model, lambda model, tokens: model(tokens), torch.randint(n_characters, (8, 65)))


def _hugging_face(make):
    import transformers

    model = make(transformers).train()
    return _next_token(model, lambda model, tokens: model(input_ids=tokens).logits, torch.randint(30000, (4, 129)))


def _gpt2():
    sizes = dict(n_layer=4, n_head=4, n_embd=256, vocab_size=50257, n_positions=256)
    return _hugging_face(lambda library: library.GPT2LMHeadModel(library.GPT2Config(**sizes)))


def _llama():
    sizes = dict(num_hidden_layers=4, hidden_size=256, intermediate_size=704, vocab_size=32000)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256)
    return _hugging_face(lambda library: library.LlamaForCausalLM(library.LlamaConfig(**sizes)).to(torch.bfloat16))


PROGRAMS = (
    Program("PPO update, 2 x 64 units", _ppo, "Adam", dict(lr=3e-4, eps=1e-5), max_norm=0.5),
    Program("tabular MLP, batch of 128", _tabular, "AdamW", dict(lr=1e-3)),
    Program("LeNet, batch of 64", _lenet, "RMSprop", dict(lr=1e-3)),
    Program("character GPT, 8 x 64", _char_gpt, "AdamW", dict(lr=1e-3), max_norm=1.0),
    Program("GPT-2 of 4 layers, 50 k classes", _gpt2, "AdamW", dict(lr=1e-4), max_norm=1.0),
    Program("Llama of 4 layers, 32 k classes, bf16", _llama, "AdamW", dict(lr=1e-4), max_norm=1.0),
)


class Training:
    """A model in training, and the seconds of each part of its steps."""

    def __init__(self, program, library, model, loss):
        self.program, self.library, self.model, self.loss = program, library, model, loss
        self.optimizer = getattr(library, program.optimizer)(model.parameters(), **program.options)
        self.seconds = []

    def step(self):
        marks = [time.perf_counter()]

        def mark():
            marks.append(time.perf_counter())

        loss = self.loss(self.model, self.library)
        mark()
        loss.backward()
        mark()
        if self.program.max_norm:
            self.library.clip_grad_norm_(self.model.parameters(), self.program.max_norm)
        mark()
        self.optimizer.step()
        mark()
        self.optimizer.zero_grad()
        mark()
        self.seconds.append([end - begin for begin, end in zip(marks, marks[1:], strict=False)])
        return loss.item()


def measured(program, seconds):
    """A row of the table.

    Raises:
        ArithmeticError: the losses of the two disagree.
        ImportError: the program needs a package that is missing.
    """
    torch.manual_seed(0)
    model, loss = program.make()
    stock, ours = pair = [Training(program, library, copy.deepcopy(model), loss) for library in (TORCH, FASTOPT)]
    for _ in range(N_CHECKED_STEPS):
        expected, found = (training.step() for training in pair)
        if not abs(found - expected) <= TOLERANCE * max(1, abs(expected)):
            raise ArithmeticError(f"the loss must be torch's, {expected:.6g}, got {found:.6g}")
    for training in pair:
        training.seconds.clear()
    deadline = time.perf_counter() + seconds
    while len(ours.seconds) < MIN_STEPS or time.perf_counter() < deadline:
        for training in pair if len(ours.seconds) % 2 else pair[::-1]:
            training.step()
    whole = [[1e3 * sum(parts) for parts in training.seconds] for training in pair]
    ratios = measure.spread([expected / found for expected, found in zip(*whole, strict=True)])
    parts = [[1e3 * statistics.median(part) for part in zip(*its.seconds, strict=True)] for its in (stock, ours)]
    medians = [_both(*map(statistics.median, whole)), *(_both(*part) for part in zip(*parts, strict=True))]
    return [
        program.name,
        medians[0],
        f"**{ratios['median']:.2f}x**",
        f"{ratios['p10']:.2f}-{ratios['p90']:.2f}",
    ] + medians[1:]


def _both(stock_ms, our_ms):
    return f"{stock_ms:.3f}, {our_ms:.3f}"


def _line(cells):
    return f"| {' | '.join(cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", metavar="NAME", help="programs whose name has one of these; default: all")
    parser.add_argument(
        "--seconds", type=non_negative, default=8.0, metavar="S", help="for each program; default: %(default)s"
    )
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(), help="default: %(default)s")
    readme = functools.partial(readme_with, MARKERS)
    parser.add_argument("--readme", type=readme, metavar="FILE", help=f"rewrite what is after {MARKERS[0]}")
    args = parser.parse_args(argv)
    programs = [program for program in PROGRAMS if not args.only or any(name in program.name for name in args.only)]
    if not programs:
        parser.error(f"argument NAME: must be part of a program's name, got {args.only}")
    torch.set_num_threads(args.threads)
    lines, status = [_line(HEADS), "|---" * len(HEADS) + "|"], 0
    print("\n".join(lines), flush=True)
    for program in programs:
        try:
            cells = measured(program, args.seconds)
        except (ArithmeticError, ImportError) as error:
            is_wrong = isinstance(error, ArithmeticError)
            status |= is_wrong
            cells = [program.name, f"{'wrong' if is_wrong else 'not run'}: {error}", *["-"] * (len(HEADS) - 2)]
        lines.append(_line(cells))
        print(lines[-1], flush=True)
    if args.readme:
        described = machine.one_line(machine.describe("cpu", args.threads))
        command = shlex.join(["python", "benchmarks/programs.py", *args.only, "--seconds", f"{args.seconds:g}"])
        block = f"{described}. `{command}`\n\n" + "\n".join(lines)
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(rewrite_between_markers(text, block, MARKERS), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
