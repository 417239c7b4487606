"""Settings of tests whose examples hypothesis draws.

The examples are the same on every run; FASTOPT_TEST_EXAMPLES=5000 draws that many, new ones each time.
"""

import os

from hypothesis import HealthCheck, settings

N_EXAMPLES = int(os.environ.get("FASTOPT_TEST_EXAMPLES", "0"))
drawn = settings(
    max_examples=N_EXAMPLES or 80,
    derandomize=not N_EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
