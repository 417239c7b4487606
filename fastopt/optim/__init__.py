"""Fused optimizers: subclasses of their namesakes in :mod:`torch.optim`, with the same arguments and state."""

import torch

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam
from .adamw import AdamW
from .functional import register
from .lion import Lion
from .nadam import NAdam
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Lion", "NAdam", "RMSprop"]

register([(globals()[name], getattr(torch.optim, name)) for name in __all__ if hasattr(torch.optim, name)])
