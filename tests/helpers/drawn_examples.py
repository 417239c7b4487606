"""Settings of tests whose examples hypothesis draws, and the comparison of their results.

The examples are the same on every run; FASTOPT_TEST_EXAMPLES=5000 draws that many, new ones each time.
"""

import os

import torch
from hypothesis import HealthCheck, settings

from common import assert_no_worse, is_native

N_EXAMPLES = int(os.environ.get("FASTOPT_TEST_EXAMPLES", "0"))
drawn = settings(
    max_examples=N_EXAMPLES or 80,
    derandomize=not N_EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def assert_as_exact(own, other, truth, slack_in_float64=32):
    """No worse than torch's own by more than rounding; where torch overflows, truth is the measure.

    The reference path is torch's own loss, at least in float32: it may overflow with it.
    """
    expected = truth.to(own.dtype)
    if not is_native():
        own = torch.where(other.isfinite() | (own != other), own, expected)
    other = torch.where(other.isfinite(), other, expected)
    one = own.new_ones(1)
    slack = slack_in_float64 if own.dtype == torch.float64 else 4
    assert_no_worse(*(torch.cat([v.flatten().to(own.dtype), one]) for v in (own, other, expected)), slack=slack)
