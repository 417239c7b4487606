"""What the tests of cross-entropy's modes share: small cases, and a call with torch's function and with ours."""

import pytest
import torch
import torch.nn.functional as F

import fastopt
from loss_cases import KINDS, Logits, Options, make_values

cross_entropy = fastopt.functional.cross_entropy
SHAPES = [
    Logits((5,), "contiguous", "no batch"),
    Logits((3, 4), "contiguous", "narrow rows"),
    Logits((2, 67), "contiguous", "wide rows"),
    Logits((2, 3, 2, 2), "contiguous", "columns"),
    Logits((2, 3, 2, 2), "channels_last", "rows of an image"),
]
OPTIONS = [Options(k.kind, k.has_weight, k.smoothing, k.ignored, r) for k in KINDS for r in ("mean", "none")]
shapes = pytest.mark.parametrize("logits", SHAPES, ids=str)
options_table = pytest.mark.parametrize("options", OPTIONS, ids=str)


def make_case(logits, options, dtype=torch.float64):
    target, arguments = options.make(logits, dtype)
    return logits.lay(make_values(logits.sizes, dtype, scale=1.0)), target, arguments


def both(call):
    """The results of a call with torch's function and with ours."""
    return call(F.cross_entropy), call(cross_entropy)


def assert_both_same(call):
    theirs, ours = both(call)
    torch.testing.assert_close(ours, theirs)


X = make_values((6, 10), scale=1.0)
T = torch.tensor([0, 9, 3, -100, 5, 5])
