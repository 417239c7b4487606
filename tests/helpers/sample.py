"""The sample of the tests that ``python -m pytest`` runs; ``--all`` runs all, and so does a test that is named.

Of a test with many cases, each value of each of its parameters occurs in at least two cases of the sample, beside
values of the other parameters that a checksum chooses: the same on every run. Tests that are marked ``slow`` or
``timed`` are not in the sample.
"""

import zlib

TIMES = 2  # that each value occurs


def is_wanted(config):
    """True if the sample is wanted: nothing else was asked for."""
    return not config.getoption("--all") and not any("::" in argument for argument in config.args)


def split(items):
    """The items that are in the sample, and the others."""
    by_test = {}
    for item in items:
        if not any(item.iter_markers("slow")) and not any(item.iter_markers("timed")):
            by_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    chosen = {item for cases in by_test.values() for item in _cover(cases)}
    return [item for item in items if item in chosen], [item for item in items if item not in chosen]


def _cover(cases):
    """Cases in which each value of each parameter occurs often enough."""
    seen, chosen = {}, []
    for case in sorted(cases, key=lambda case: zlib.crc32(case.nodeid.encode())):
        params = case.callspec.params if hasattr(case, "callspec") else {"": None}
        values = [(name, id(value)) for name, value in params.items()]  # the same objects in each case
        if any(seen.get(value, 0) < TIMES for value in values):
            chosen.append(case)
            for value in values:
                seen[value] = seen.get(value, 0) + 1
    return chosen
