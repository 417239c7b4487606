"""Fused losses and optimizers for PyTorch: torch's names, torch's numbers, less time.

Importing compiles nothing and prints nothing; the first use of a kernel finds or builds the library.
"""

from . import _ops, optim
from . import nn as nn
from ._build.native import build, empty_cache, info
from ._calls import count_calls
from .convert import convert_state_dict
from .nn import *  # noqa: F403
from .optim import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "build",
    "convert_state_dict",
    "count_calls",
    "empty_cache",
    "info",
    "nn",
    "optim",
    *nn.__all__,
    *optim.__all__,
]

_ops.define()
