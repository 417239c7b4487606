"""Stand-in packages with CUDA sources."""

import pytest

from stand_in import CUDA_COMPILED


@pytest.fixture
def cuda(copied):
    """A package whose extension is compiled, with CUDA sources and nothing to compile them."""
    copied.add_cuda()
    return copied


@pytest.fixture
def with_nvcc(cuda):
    cuda.add_nvcc()
    return cuda


@pytest.fixture
def compiled(with_nvcc):
    """A package whose CUDA library has been compiled just in time."""
    assert with_nvcc.run_cuda() == ("{True}", CUDA_COMPILED)
    return with_nvcc
