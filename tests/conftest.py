"""Skips tests of the kernels where the reference path serves."""

import pytest

from common import is_native


def pytest_collection_modifyitems(items):
    if is_native():
        return
    skip = pytest.mark.skip(reason="the reference path serves")
    for item in items:
        if "native" in item.keywords:
            item.add_marker(skip)


def pytest_report_header():
    import fastopt

    return f"fastopt: {fastopt.info()['backend']}"
