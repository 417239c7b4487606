"""AdamW: Adam with decoupled weight decay."""

import torch

from .adam import Adam


class AdamW(Adam, torch.optim.AdamW):
    r"""AdamW: :class:`torch.optim.AdamW` in one native call a step.

        param -= lr * weight_decay * param, then :class:`fastopt.Adam` without decay

    Args:
        params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused: as :class:`fastopt.Adam`.
        weight_decay: decoupled decay. Default: 1e-2

    State of a parameter: as :class:`fastopt.Adam`.

    Raises:
        ValueError: as :class:`torch.optim.AdamW`, for arguments out of range.

    Source: Loshchilov & Hutter, arXiv:1711.05101, 2019.
    """
