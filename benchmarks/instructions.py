"""Counts instructions of small fixed work under valgrind, a check of speed that holds on a busy machine.

    python benchmarks/instructions.py [--update] [--tolerance 0.15]

Fails with 1 if a workload takes over 15 % more instructions a call than ``instructions.json`` holds for the same torch,
Python and compiler; with others it prints that there is nothing to compare. One thread runs in one valgrind process:
each workload a few times, then many times, and the difference is counted, so that one-time work cancels.

valgrind (to 3.25 at least) hides AVX-512 from cpuid, so the AVX2 clones of the kernels run and are counted.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fastopt
from fastopt.bench.tables import LENET

RECORDED = Path(__file__).with_name("instructions.json")
N_WARM, N_FEW, N_MANY = 20, 10, 60

# Callgrind's requests are instruction sequences that do nothing elsewhere; its header has them for C only.
HELPER = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def step_of(cls, shapes, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(torch.full(shape, 0.1, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    return cls(params, **options).step


def cross_entropy(*shape, is_transposed=False):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    logits = (logits.t().contiguous().t() if is_transposed else logits).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)

    def call():
        logits.grad = None
        fastopt.functional.cross_entropy(logits, target).backward()

    return call


WORKLOADS = {
    "Adam step, LeNet": lambda: step_of(fastopt.Adam, LENET, lr=1e-3),
    "SGD step, 1000 tensors of 64": lambda: step_of(fastopt.SGD, [(64,)] * 1000, lr=1e-3, momentum=0.9),
    "SGD step, 8192": lambda: step_of(fastopt.SGD, [(8192,)], lr=1e-3),
    "AMSGrad step, 8192": lambda: step_of(fastopt.Adam, [(8192,)], lr=1e-3, amsgrad=True),
    "Adam step, 8192 of bfloat16": lambda: step_of(fastopt.Adam, [(8192,)], torch.bfloat16, lr=1e-3),
    "Adam step, 8192 of float16": lambda: step_of(fastopt.Adam, [(8192,)], torch.float16, lr=1e-3),
    "cross-entropy 64 x 10": lambda: cross_entropy(64, 10),
    "cross-entropy 32 x 1000": lambda: cross_entropy(32, 1000),
    "cross-entropy 256 x 10 x 2": lambda: cross_entropy(256, 10, 2),
    "cross-entropy 8 x 1000 x 8": lambda: cross_entropy(8, 1000, 8),
    "cross-entropy 12 x 1777 by class": lambda: cross_entropy(12, 1777, is_transposed=True),
}


def run_inside(helper_file):
    """Under valgrind: every workload a few and many times, each lot dumped by name."""
    helper = ctypes.CDLL(helper_file)
    gc.disable()
    torch.set_num_threads(1)
    for name, make in WORKLOADS.items():
        call = make()
        for _ in range(N_WARM):
            call()
        helper.start()
        for n_calls in (N_FEW, N_FEW, N_MANY):  # the first lot only has valgrind translate the code
            helper.zero()
            for _ in range(n_calls):
                call()
            helper.dump(f"{n_calls} {name}".encode())
    print(f"instruction set: {fastopt.info()['instruction_set']}")


def count(folder):
    """{workload: {"all": instructions a call, "library": those within fastopt's library}}, and the instruction set."""
    helper = folder / "helper.so"
    source = folder / "helper.c"
    source.write_text(HELPER)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", helper, source], check=True)
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
    command += [sys.executable, __file__, "--inside", str(helper)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"valgrind ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}")
    instruction_set = re.search(r"instruction set: (\S+)", ran.stdout)[1]
    lots = dict(read_dump(file) for file in sorted(folder.glob("out.*")))
    counts = {}
    for name in WORKLOADS:
        few, many = lots[f"{N_FEW} {name}"], lots[f"{N_MANY} {name}"]
        counts[name] = {part: round((many[part] - few[part]) / (N_MANY - N_FEW)) for part in few}
    return counts, instruction_set


def read_dump(file):
    """(name of the dump, {"all": n, "library": n}) of one of callgrind's files."""
    objects, current, is_call, name = {}, "", False, ""
    instructions = {"all": 0, "library": 0}
    for line in file.read_text().splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            name = line.removeprefix("desc: Trigger: Client Request: ")
        elif line.startswith("ob="):
            number, path = re.fullmatch(r"ob=\((\d+)\)(?: (.*))?", line).groups()
            current = objects.setdefault(number, path)
        elif line.startswith("cob="):
            number, path = re.fullmatch(r"cob=\((\d+)\)(?: (.*))?", line).groups()
            objects.setdefault(number, path)
        elif line.startswith("calls="):
            is_call = True  # the next line's cost is that of the callee, which has lines of its own
        elif line[:1] in "+-*0123456789" and line:
            if not is_call:
                n = int(line.split()[1])
                instructions["all"] += n
                instructions["library"] += n * (Path(current or "").name.startswith("_C."))
            is_call = False
    return name, instructions


def missing():
    """The tool that the check needs and this machine lacks, or None."""
    for tool in ("valgrind", "cc"):
        if not shutil.which(tool):
            return f"no {tool}"
    probe = subprocess.run(["cc", "-E", "-"], input="#include <valgrind/callgrind.h>", capture_output=True, text=True)
    return "no valgrind/callgrind.h" if probe.returncode else None


def setting(instruction_set):
    """The versions that the counts depend on."""
    compiler = re.sub(r"^\S*/", "", fastopt.info()["compiler"])
    python = ".".join(platform.python_version_tuple()[:2])
    return f"torch {torch.__version__}, Python {python}, {compiler}, {instruction_set}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="record what is counted")
    parser.add_argument("--tolerance", type=float, default=0.15, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_inside(args.inside)
        return 0
    reason = missing()
    if reason:
        print(f"SKIPPED: {reason}")
        return 0
    fastopt.build()
    with tempfile.TemporaryDirectory() as folder:
        counts, instruction_set = count(Path(folder))
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    where = setting(instruction_set)
    print(where)
    before = recorded.get(where, {})
    is_slower = False
    for name, parts in counts.items():
        for part, n in parts.items():
            change = n / before[name][part] - 1 if name in before else None
            is_slower |= change is not None and change > args.tolerance
            change_text = "not recorded" if change is None else f"{change:+.1%}{' MORE' * (change > args.tolerance)}"
            print(f"{name:<32} {part:<8} {n:>9,}  {change_text}")
    if args.update:
        recorded[where] = counts
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    elif not before:
        print(f"SKIPPED: {RECORDED.name} holds no counts for this torch, Python and compiler; --update records them")
    return int(is_slower and not args.update)


if __name__ == "__main__":
    sys.exit(main())
