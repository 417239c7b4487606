"""Whole programs whose models call ``torch.nn.functional.cross_entropy``, with that function replaced by fastopt's.

A small GPT as people write it, and Hugging Face's ``Trainer`` with a small Llama, eager and compiled, train as with
torch.
"""

import pytest
import torch
import torch.nn.functional as F

import fastopt
from common import is_native, kernel_calls

N_CLASSES, LENGTH, WIDTH = 211, 24, 32
TORCHS = F.cross_entropy


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.attend = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.project = torch.nn.Linear(WIDTH, WIDTH)
        self.widen = torch.nn.Sequential(
            torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(128, WIDTH)
        )

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.attend(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.project(mixed)
        return x + self.widen(x)


class Gpt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(N_CLASSES, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.Sequential(Block(), Block(), torch.nn.LayerNorm(WIDTH))
        self.head = torch.nn.Linear(WIDTH, N_CLASSES, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1)))
        logits = self.head(self.blocks(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def gpt_losses(optimizer_class, is_compiled, dtype):
    torch.manual_seed(0)
    model = Gpt()
    optimizer = optimizer_class(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    call = torch.compile(model) if is_compiled else model
    losses = []
    for _ in range(8):
        tokens = torch.randint(N_CLASSES, (6, LENGTH + 1))
        targets = tokens[:, 1:].clone()
        targets[:, ::5] = -1
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            _, loss = call(tokens[:, :-1], targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.fixture
def _replaced(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(F, "cross_entropy", fastopt.functional.cross_entropy)
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_replaced")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpt_trains_as_with_torch(is_compiled, dtype, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", TORCHS)
    theirs = gpt_losses(torch.optim.AdamW, False, dtype)
    monkeypatch.setattr(F, "cross_entropy", fastopt.functional.cross_entropy)
    calls = kernel_calls("cross_entropy")
    ours = gpt_losses(fastopt.AdamW, is_compiled, dtype)
    assert ours == pytest.approx(theirs, rel=1e-4 if dtype is None else 0.03)
    if is_native() and not is_compiled:
        assert kernel_calls("cross_entropy") == calls + len(ours)


def trainer_losses(folder, is_compiled):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=N_CLASSES,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(N_CLASSES, (LENGTH,), generator=generator) for _ in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        learning_rate=3e-3,
        use_cpu=True,
        torch_compile=is_compiled,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row.masked_fill(row % 7 == 0, -100)} for row in rows]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_replaced")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_hugging_faces_trainer_trains_a_llama_as_with_torch(is_compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", TORCHS)
    theirs = trainer_losses(tmp_path / "torch", False)
    monkeypatch.setattr(F, "cross_entropy", fastopt.functional.cross_entropy)
    calls = kernel_calls("cross_entropy")
    ours = trainer_losses(tmp_path / "fastopt", is_compiled)
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=2e-3)
    if is_native() and not is_compiled:
        assert kernel_calls("cross_entropy") > calls
