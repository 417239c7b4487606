"""Runs tables of tests on each device; skips what needs kernels without them; fixtures of all tests."""

import gc
import shutil

import pytest

import devices
import sample
from common import forget_factors, is_native, kernel_calls
from stand_in import Containing, Package


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="all tests, not a sample (tests/helpers/sample.py)")


def pytest_generate_tests(metafunc):
    runs_on = getattr(metafunc.module, "RUNS_ON", None)
    if runs_on:
        metafunc.parametrize("device", devices.params(runs_on), indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def device(request):
    """The device that the module's tests run on now."""
    with devices.running_on(getattr(request, "param", devices.CPU)) as name:
        yield name


def pytest_collection_modifyitems(config, items):
    if sample.is_wanted(config):
        items[:], others = sample.split(items)
        config.hook.pytest_deselected(items=others)
    if is_native():
        return
    skip = pytest.mark.skip(reason="needs the compiled kernels")
    for item in items:
        if "native" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    gc.freeze()  # collecting garbage takes half a second where it looks at all items


def pytest_report_header(config):
    import fastopt

    cases = "a sample of the cases; --all runs all" if sample.is_wanted(config) else "all cases"
    return f"fastopt: {fastopt.info()['backend']}; {cases}"


_n_losses = 0  # of the kernels when factors were last forgotten


@pytest.fixture(autouse=True)
def no_factors_of_other_tests(device):
    """A backward runs the kernel again where the factor is not the expected one, and tests count how often it runs."""
    global _n_losses
    if is_native() and device == devices.CPU and kernel_calls("cross_entropy") != _n_losses:
        forget_factors()
        _n_losses = kernel_calls("cross_entropy")


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path / "checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A package whose library has been compiled just in time; copied, never changed."""
    package = Package(tmp_path_factory.mktemp("built") / "checkout")
    assert package.run() == ("native-cpu-baseline", Containing("compiling", "compiled in"))
    return package


@pytest.fixture
def copied(built, tmp_path):
    """A package whose cache holds the compiled library."""
    package = Package(tmp_path / "checkout")
    shutil.copytree(built.cache, package.cache)
    return package
