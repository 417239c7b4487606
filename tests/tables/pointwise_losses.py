"""The pointwise losses, a row each: what their tests need to know."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastopt


@dataclass(frozen=True)
class PointwiseLoss:
    name: str  # in torch.nn.functional
    module_name: str  # in torch.nn
    why: str  # this row is there
    saves_derivatives: bool = False  # and not the inputs, which may be changed in place before the backward

    @property
    def ours(self):
        return getattr(fastopt.functional, self.name)

    @property
    def torchs(self):
        return getattr(F, self.name)

    def __str__(self):
        return self.name

    def make(self, shape, dtype=torch.float64, seed=0):
        """Input and target."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


LOSSES = [
    PointwiseLoss("mse_loss", "MSELoss", "derivatives of any size"),
    PointwiseLoss("l1_loss", "L1Loss", "a derivative that jumps", saves_derivatives=True),
]
