"""Fused losses: subclasses of their namesakes in :mod:`torch.nn`, and functions as in :mod:`torch.nn.functional`."""

from . import functional, loss
from .loss import *  # noqa: F403

__all__ = ["functional", *loss.__all__]
