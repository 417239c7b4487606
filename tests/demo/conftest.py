"""Fixtures of tests that run the demo."""

import pytest
import torch

from fastopt.demo import glyphs


@pytest.fixture
def few_drawn_digits(tmp_path, monkeypatch):
    """No digits around, few drawn ones, and torch's threads as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FASTOPT_DATA", raising=False)
    monkeypatch.setattr(glyphs, "draw", lambda n, stream, draw=glyphs.draw: draw(n // 20, stream))
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)
