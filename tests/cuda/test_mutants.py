"""The tests of the CUDA kernels find faults: each mutant of a kernel fails a short probe of them all on the shim."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

import devices
from paths import ROOT, child_environment

pytestmark = [
    pytest.mark.native,
    pytest.mark.shim,
    pytest.mark.slow,
    pytest.mark.skipif(devices.CXX is None, reason="needs g++"),
]

TIMEOUT_S = 300


@dataclass(frozen=True)
class Mutant:
    why: str
    file: str  # of csrc/cuda
    old: str
    new: str
    compiled_in: str  # the file of csrc/cuda whose object shows it

    def __str__(self):
        return self.why


LOSS, UPDATE, SCALE = "cross_entropy/float32.cu", "update_float32.cu", "scale.cu"
MUTANTS = [
    Mutant(
        "no barrier after warps have left their sums",
        "reduce.cuh",
        "of_warps[threadIdx.x / kWarp] = value;\n    __syncthreads();",
        "of_warps[threadIdx.x / kWarp] = value;",
        LOSS,
    ),
    Mutant(
        "no barrier before the sums of the last exchange are overwritten",
        "reduce.cuh",
        "__syncthreads();  // the last exchange has been read",
        "",
        LOSS,
    ),
    Mutant(
        "no barrier before a row overwrites the one before in shared memory",
        "cross_entropy/rows.cuh",
        "Group::sync();  // the row before has been read",
        "",
        LOSS,
    ),
    Mutant(
        "a shuffle too few",
        "reduce.cuh",
        "offset > 0; offset /= 2) value +=",
        "offset > 1; offset /= 2) value +=",
        LOSS,
    ),
    Mutant(
        "the last class of a row is missed",
        "cross_entropy/row.cuh",
        "if (after + rank < n) single",
        "if (after + rank + 1 < n) single",
        LOSS,
    ),
    Mutant(
        "a class before the first boundary is missed",
        "cross_entropy/row.cuh",
        "if (rank < before) single",
        "if (rank + 1 < before) single",
        LOSS,
    ),
    Mutant(
        "a pack too far",
        "cross_entropy/row.cuh",
        "(n_packs - pack + size - 1) / size",
        "(n_packs - pack + size) / size",
        LOSS,
    ),
    Mutant(
        "the maximum is not exchanged",
        "cross_entropy/row.cuh",
        "sums.rebase(Group::max(sums.max));",
        "Group::max(sums.max);",
        LOSS,
    ),
    Mutant(
        "the last block does not wait for the others",
        "cross_entropy/call.cuh",
        "== gridDim.x - 1;\n    }\n    __syncthreads();\n    if (!is_last) return;\n    __threadfence();",
        "== 0;\n    }\n    __syncthreads();\n    if (!is_last) return;\n    __threadfence();",
        LOSS,
    ),
    Mutant(
        "parts of a row overlap",
        "cross_entropy/rows.cuh",
        "const int64_t end = first + width < n_classes ? first + width : n_classes;",
        "const int64_t end = first + width + 1 < n_classes ? first + width + 1 : n_classes;",
        LOSS,
    ),
    Mutant(
        "positions begin one late",
        "cross_entropy/positions.cuh",
        "* blockDim.x + threadIdx.x; position < n;",
        "* blockDim.x + threadIdx.x + 1; position < n;",
        LOSS,
    ),
    Mutant(
        "static shared memory does not count when a kernel is to ask for more",
        "cross_entropy/launch_kernels.cuh",
        "if (plan.shared_bytes > 0)",
        "if (plan.shared_bytes > 48 * 1024)",
        LOSS,
    ),
    Mutant(
        "static shared memory does not count in what a kernel asks for",
        "device.h",
        "max_bytes - static_cast<int>(attributes.sharedSizeBytes)",
        "max_bytes",
        LOSS,
    ),
    Mutant(
        "a chunk goes to the entry before",
        "update_arguments.cuh",
        "first_chunk <= chunk",
        "first_chunk < chunk",
        UPDATE,
    ),
    Mutant(
        "the ticket is not back at 0",
        "update_arguments.cuh",
        "atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1",
        "atomicInc(ticket, gridDim.x + 7) == gridDim.x - 1",
        UPDATE,
    ),
    Mutant(
        "no barrier before a rule that one thread finished is read",
        "update_arguments.cuh",
        "memcpy(finished, &rule, sizeof(Rule));\n  }\n  __syncthreads();",
        "memcpy(finished, &rule, sizeof(Rule));\n  }",
        UPDATE,
    ),
    Mutant(
        "steps are counted before all blocks have read them",
        "update_arguments.cuh",
        "if (!is_last) return;\n  constexpr",
        "if (blockIdx.x != 0) return;\n  constexpr",
        UPDATE,
    ),
    Mutant(
        "the last element of a tensor is missed",
        "update_kernel.cuh",
        "for (int64_t i = begin + threadIdx.x; i < end;",
        "for (int64_t i = begin + threadIdx.x; i < end - 1;",
        UPDATE,
    ),
    Mutant(
        "the end of a scaled gradient is missed",
        "scale.cu",
        "+ rank; i < scale.n;",
        "+ rank; i < scale.n - 1;",
        SCALE,
    ),
]

# Fails, or is killed, where a kernel is wrong. Runs every kind of kernel in order and in shuffled orders.
PROBE = """
import sys
import ctypes
import torch
import torch.nn.functional as F
import fastopt
from loss_cases import loss_and_grad, make_values, truth_of
from optim_cases import make_params, set_grads

fastopt._build.native.module().load_host_shim(sys.argv[1])
shim = ctypes.CDLL(sys.argv[1])
for seed in (-1, 0, 1, 2):
    shim.fastopt_shim_seed(ctypes.c_longlong(seed))
    for shape in ((300, 10), (40, 41), (5, 1025), (15, 8193), (4, 12_200), (2, 16_385)):
        x, target = 0.1 * make_values(shape), torch.arange(shape[0]) % shape[1]
        target[-1] = shape[1] - 1
        own = loss_and_grad(fastopt.functional.cross_entropy, x, target, torch.tensor(3.0))
        truth = truth_of(F.cross_entropy, x, target, torch.tensor(3.0))
        for a, b in zip(own, truth):
            assert torch.allclose(a.double(), b, rtol=2e-5, atol=1e-12), (shape, seed)
    results = []
    for cls, dtype in ((fastopt.Adam, torch.float32), (torch.optim.Adam, torch.float64)):
        params = make_params([(3,), (5000,), (1,)], dtype)
        optimizer = cls(params, fused=True)
        for step in range(3):
            set_grads(params, seed=step)
            optimizer.step()
        results.append(params)
        assert all(optimizer.state[p]["step"] == 3 for p in params)
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-5
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A library for each mutant, and the one of none."""
    objects = devices.compile_all()

    def make(mutant):
        folder = tmp_path_factory.mktemp("mutant")
        csrc = folder / "csrc"
        for name in ("cuda", "rules", "update", "losses", "math"):
            shutil.copytree(ROOT / "csrc" / name, csrc / name)
        for header in (ROOT / "csrc").glob("*.h"):
            shutil.copy(header, csrc)
        changed = csrc / "cuda" / mutant.file
        text = changed.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times"
        changed.write_text(text.replace(mutant.old, mutant.new))
        source = csrc / "cuda" / mutant.compiled_in
        object_file = devices.compile_object(source, folder / "mutant.o", csrc)
        name = source.relative_to(csrc / "cuda").with_suffix("").as_posix()
        return devices.link({**objects, name: object_file}, folder / "shim.so")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(MUTANTS, pool.map(make, MUTANTS), strict=True))
    return {None: devices.shim_library(), **made}


def probe(library):
    command = [sys.executable, "-c", PROBE, str(library)]
    # 3, so that a block's rows lie differently across boundaries.
    env = child_environment(OMP_NUM_THREADS="1", FASTOPT_SHIM_MULTIPROCESSORS="3")
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_unchanged_kernels_pass_the_probe(libraries):
    result = probe(libraries[None])
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(libraries, mutant):
    result = probe(libraries[mutant])
    assert result.returncode != 0
    assert "Error" in result.stderr or result.returncode < 0, result.stderr[-2000:]
