"""Fused losses: subclasses of their namesakes in :mod:`torch.nn`, and functions as in :mod:`torch.nn.functional`."""

from . import functional
from .loss import CrossEntropyLoss

__all__ = ["CrossEntropyLoss", "functional"]
