"""Libraries of the shim's self-test."""

import pytest

from shim_self_test import IN_ORDER, compile_library, load


@pytest.fixture(scope="session")
def self_test(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("shim_asan"), "-fsanitize=address")


@pytest.fixture
def library(self_test):
    library = load(self_test)
    yield library
    library.fastopt_shim_seed(IN_ORDER)
