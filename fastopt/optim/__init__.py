"""Fused optimizers: subclasses of their namesakes in :mod:`torch.optim`, with the same arguments and state."""

from .adam import Adam
from .adamw import AdamW
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]
