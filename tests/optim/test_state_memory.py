"""The memory of large states: huge pages of the library's, in tensors that are otherwise as torch makes them."""

import copy
import io

import pytest
import torch

import fastopt
from common import kernel_calls
from optimizers import BY_NAME, CONFIGURATIONS, OURS, THEIRS

pytestmark = pytest.mark.native

HUGE_PAGE = 2 << 20
SLIGHTLY_LESS = HUGE_PAGE // 2 - 5  # elements of float32, than two pages
configurations = pytest.mark.parametrize(
    ("name", "options"),
    [(n, o) for n, o in CONFIGURATIONS if set(BY_NAME[n].states(o)) - {"step"} and not BY_NAME[n].has_states_at_once],
    ids=str,
)


def stepped(module, name, options, shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format).requires_grad_()
    optimizer = getattr(module, name)([param], **options)
    param.grad = torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format)
    optimizer.step()
    return optimizer, param


def states(optimizer, param):
    return {name: state for name, state in optimizer.state[param].items() if state.shape == param.shape}


@configurations
@pytest.mark.parametrize(
    ("shape", "dtype", "is_large", "memory_format"),
    [
        ((HUGE_PAGE // 4,), torch.float32, True, torch.contiguous_format),
        ((HUGE_PAGE // 4 - 1,), torch.float32, False, torch.contiguous_format),
        ((HUGE_PAGE // 4 + 5,), torch.float32, False, torch.contiguous_format),  # a second page would be lost
        ((15 * HUGE_PAGE // 32,), torch.float32, True, torch.contiguous_format),
        ((HUGE_PAGE // 8,), torch.float64, True, torch.contiguous_format),
        ((HUGE_PAGE // 2 + 1,), torch.bfloat16, False, torch.contiguous_format),
        ((8 * HUGE_PAGE // 2 + 1,), torch.bfloat16, True, torch.contiguous_format),
        ((HUGE_PAGE // 2 - 1,), torch.float16, False, torch.contiguous_format),
        ((300, 64, 14, 14), torch.float32, True, torch.channels_last),
        ((300, 64, 14, 14), torch.float16, True, torch.channels_last),
    ],
)
def test_large_states_are_page_aligned_and_equal_torchs(name, options, shape, dtype, is_large, memory_format):
    before = kernel_calls("update")
    optimizer, param = stepped(OURS, name, options, shape, dtype, memory_format)
    assert kernel_calls("update") > before
    expected = states(*stepped(THEIRS, name, options, shape, dtype, memory_format))
    found = states(optimizer, param)
    assert list(found) == list(expected)
    # Memory of malloc's begins with a page by chance, but not in each of nine.
    n_more = 0 if is_large else 8
    made = [found, *(states(*stepped(OURS, name, options, shape, dtype, memory_format)) for _ in range(n_more))]
    for key, state in found.items():
        assert all(one[key].data_ptr() % HUGE_PAGE == 0 for one in made) == is_large
        assert type(state) is torch.Tensor
        assert state.stride() == expected[key].stride()
        assert state.dtype == dtype
        assert not state.requires_grad
        assert not state.is_inference()
        if dtype.itemsize >= 4:  # of 16 bits torch rounds more often
            torch.testing.assert_close(state, expected[key])


@configurations
def test_memory_holds_exactly_what_a_state_needs(name, options):
    optimizer, param = stepped(OURS, name, options, (SLIGHTLY_LESS,))
    for state in states(optimizer, param).values():
        assert state.untyped_storage().nbytes() == param.nbytes
        assert state.storage_offset() == 0


@configurations
def test_states_can_be_copied_saved_grown_and_freed(name, options):
    optimizer, param = stepped(OURS, name, options, (SLIGHTLY_LESS,))
    expected = {key: state.tolist() for key, state in states(optimizer, param).items()}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)["state"][0]
    copied = copy.deepcopy(optimizer.state_dict())["state"][0]
    for key, values in expected.items():
        assert loaded[key].tolist() == copied[key].tolist() == values
    state = states(optimizer, param).popitem()[1]
    optimizer.state.clear()
    assert state.resize_(2 * param.numel())[: param.numel()].tolist() == values


@configurations
def test_memory_of_a_freed_state_is_returned(name, options):
    fastopt.empty_cache()
    optimizer, param = stepped(OURS, name, options, (4 * HUGE_PAGE,))
    del optimizer, param
    assert fastopt.empty_cache() == 0


@configurations
def test_patched_zeros_like_still_makes_the_states(name, options, monkeypatch):
    """The kernels make a momentum buffer by themselves, as torch makes it of the gradient."""
    if BY_NAME[name].operator == "sgd_":
        pytest.skip("torch makes no zeros")
    made = []

    def zeros_like(*args, **kwargs):
        made.append(torch.full_like(*args, fill_value=0.0, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    optimizer, param = stepped(OURS, name, options, (HUGE_PAGE // 4,))
    assert [id(state) for state in states(optimizer, param).values()] == [id(state) for state in made]


@configurations
def test_in_inference_mode_states_are_as_torchs(name, options):
    with torch.inference_mode():
        found = states(*stepped(OURS, name, options, (HUGE_PAGE // 4,)))
        expected = states(*stepped(THEIRS, name, options, (HUGE_PAGE // 4,)))
    assert {k: s.is_inference() for k, s in found.items()} == {k: s.is_inference() for k, s in expected.items()}
