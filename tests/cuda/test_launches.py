"""What only the shim lets tests control: the order of warps and blocks, failures of launches, the driver's age."""

import ctypes
import itertools

import pytest
import torch

import devices
import fastopt
from loss_cases import KINDS, loss_and_grad, make_values
from optim_cases import make_params, set_grads

RUNS_ON = (devices.SHIM_DEVICE,)

cross_entropy = fastopt.functional.cross_entropy
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


def shim():
    """The shim's own functions."""
    return ctypes.CDLL(str(devices.shim_library()))


def test_limit_of_shared_memory_is_set_once_a_kernel():
    """Else a thread could lower it between another's setting and launch."""
    for n_classes in (13_000, 28_000, 12_200, 20_000, 1025):
        cross_entropy(make_values((5, n_classes)).requires_grad_(), torch.arange(5))
    assert shim().fastopt_shim_changed_limits() == 0


@kinds
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_warps_and_blocks_gives_the_same_bits(options, seed):
    x = make_values((9, 1100))
    target = torch.arange(9) * 100 if options.kind == "index" else make_values((9, 1100), seed=1).softmax(1)
    small, few = make_values((70, 40)), make_values((2, 17_000))
    indices = torch.arange(70) % 40

    def results():
        yield loss_and_grad(cross_entropy, x, target, label_smoothing=options.smoothing)
        yield loss_and_grad(cross_entropy, small, indices, label_smoothing=options.smoothing)
        yield loss_and_grad(cross_entropy, few, indices[:2], label_smoothing=options.smoothing)
        params = make_params([(3000,), (7,), (5000,)])
        optimizer = fastopt.Adam(params, amsgrad=True, fused=True)
        for step in range(2):
            set_grads(params, seed=step)
            optimizer.step()
        yield [p.detach() for p in params]

    in_order = list(itertools.chain(*results()))
    shim().fastopt_shim_seed(ctypes.c_longlong(seed))
    try:
        shuffled = list(itertools.chain(*results()))
    finally:
        shim().fastopt_shim_seed(ctypes.c_longlong(-1))
    assert all(torch.equal(a, b) for a, b in zip(in_order, shuffled, strict=True))


def test_a_failed_launch_is_reported_with_what_and_where():
    out_of_memory = 2
    x, target = make_values((6, 10)), torch.arange(6)
    shim().fastopt_shim_fail_next(out_of_memory)
    with pytest.raises(RuntimeError, match=r"cross-entropy of 6 positions and 10 classes on cpu: CUDA error 2"):
        cross_entropy(x, target)
    assert cross_entropy(x, target).isfinite(), "the next call is not blamed"
    params = make_params([(3,), (4,)])
    optimizer = fastopt.SGD(params, lr=0.1)
    set_grads(params, seed=0)
    before = [p.clone() for p in params]
    shim().fastopt_shim_fail_next(out_of_memory)
    with pytest.raises(RuntimeError, match=r"updating 2 tensors of 7 elements on cpu: CUDA error 2"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


class Library(ctypes.Structure):
    """The head of what the library exports, as csrc/cuda/library.h has it."""

    _fields_ = (
        ("interface_version", ctypes.c_int32),
        ("is_host_shim", ctypes.c_bool),
        ("architectures", ctypes.c_char_p),
        ("error_text", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)),
        ("probe", ctypes.CFUNCTYPE(ctypes.c_int)),
    )


@pytest.mark.parametrize(("driver", "works"), [(12000, False), (12009, False), (12010, True), (13000, True)])
def test_driver_too_old_for_the_kernels_is_named(monkeypatch, driver, works):
    function = shim().fastopt_cuda_library
    function.restype = ctypes.POINTER(Library)
    library = function().contents
    assert library.is_host_shim
    monkeypatch.setenv("FASTOPT_SHIM_DRIVER", str(driver))
    error = library.probe()
    assert (error == 0) == works
    if not works:
        assert b"the driver is older than CUDA 12.1" in library.error_text(error)


def test_library_that_is_no_shim_is_refused(tmp_path):
    module = fastopt._build.native.module()
    with pytest.raises(RuntimeError, match="cannot be opened"):
        module.load_host_shim(str(tmp_path / "missing.so"))
    with pytest.raises(RuntimeError, match="runs on the CPU, for tests"):
        module.load_cuda(str(devices.shim_library()))
