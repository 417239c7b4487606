"""Properties of the compiled kernels, read from machine code: architectures, registers, memory, accesses.

    python tests/cuda/report.py LIBRARY

Fails if an architecture is missing, if a kernel keeps anything in local memory (a spill, or an array indexed at run
time), if one that reads float, half or bfloat16 elements has no load of 16 bytes, or if one has more static shared
memory than the shim of the tests counts with. Needs cuobjdump, nvdisasm and c++filt; the first two are in pip's
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import argparse
import collections
import functools
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80")
IN_DETAIL = "sm_90"
SHIM = Path(__file__).parents[1] / "cuda_shim" / "shared_memory.h"
# Of each block, by the system: from sm_90 on, cuobjdump counts them with a kernel's own shared memory.
RESERVED_SHARED_BYTES, RESERVED_IS_COUNTED_FROM = 1024, 90

# Patterns of demangled kernels that may break a rule, each with its reason.
MAY_USE_LOCAL_MEMORY = {}
MAY_LOAD_NARROWLY = {
    "*::cross_entropy_positions<*": "a thread walks one position's classes; those of neighbours lie side by side",
    "*::tally_kernel<*": "reads targets, and weights where they say",
    "*::prepare_kernel<*": "reads targets, and weights where they say",
}

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
ACCESSES = {"LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store"}
GENERIC = ("LD", "ST")  # of an address that may be shared memory, for all the compiler knows
NARROW_ELEMENT = re.compile(r"\b(float|BFloat16|Half|__half|__nv_bfloat16)\b")


class Kernel:
    """One kernel of one architecture."""

    def __init__(self, mangled, arch):
        self.mangled = mangled
        self.arch = arch
        self.name = mangled
        self.resources = {}
        self.accesses = collections.Counter()  # (load or store, bits)
        self.n_generic = 0
        self.n_local = 0

    def count(self, opcode):
        operation, *modifiers = opcode.split(".")
        if operation in ("LDL", "STL"):
            self.n_local += 1
        if operation in ACCESSES:
            self.n_generic += operation in GENERIC
            self.accesses[ACCESSES[operation], bits_of(modifiers)] += 1

    @property
    def stack_bytes(self):
        return self.resources["STACK"] + self.resources["LOCAL"]

    @property
    def shared_bytes(self):
        """Static shared memory, as the runtime counts it."""
        counted = self.resources["SHARED"]
        is_reserved_counted = counted > 0 and int(re.search(r"\d+", self.arch).group()) >= RESERVED_IS_COUNTED_FROM
        return counted - RESERVED_SHARED_BYTES * is_reserved_counted

    @property
    def template(self):
        return self.name.partition("<")[0].removeprefix("void ").partition("(")[0]

    @property
    def arguments(self):
        """The arguments that distinguish this kernel from others of its template."""
        inner = self.name.partition("(")[0].partition("<")[2].removesuffix(">")
        return inner.replace("fastopt::cuda::", "").replace("fastopt::", "")

    def faults(self):
        if (self.stack_bytes or self.n_local) and not is_excepted(self.name, MAY_USE_LOCAL_MEMORY):
            yield f"uses local memory: stack of {self.stack_bytes} bytes, {self.n_local} LDL or STL"
        is_wide = any(self.accesses["load", bits] for bits in (128, 256))
        if NARROW_ELEMENT.search(self.name) and not is_wide and not is_excepted(self.name, MAY_LOAD_NARROWLY):
            yield "has no load of 16 bytes"
        if not 0 <= self.shared_bytes <= shim_shared_bytes():
            yield f"has {self.shared_bytes} bytes of static shared memory: the shim counts with {shim_shared_bytes()}"


def bits_of(modifiers):
    """Bits of one access, from the modifiers of its instruction; 32 goes without saying."""
    for modifier in modifiers:
        if modifier in ("256", "128", "64"):
            return int(modifier)
        if modifier in ("U8", "S8", "U16", "S16"):
            return int(modifier[1:])
    return 32


@functools.cache
def shim_shared_bytes():
    return int(re.search(r"kStaticSharedBytes = (\d+);", SHIM.read_text()).group(1))


def is_excepted(name, exceptions):
    return any(fnmatch(name, pattern) for pattern in exceptions)


def tool(name):
    """Path of a program: on the path, or where pip's nvidia packages put it."""
    folders = [str(folder) for entry in sys.path for folder in Path(entry or ".").glob("nvidia/*/bin")]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        sys.exit(f"{name} is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def lines_of(*command):
    """Lines that a program prints, as it prints them."""
    env = {**os.environ, "PATH": f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed with status {process.returncode}")


def architectures(cuobjdump, library):
    """Machine code and PTX in a library, named as nvcc does."""
    real = {found for line in lines_of(cuobjdump, "--list-elf", library) for found in re.findall(r"sm_\d+\w?", line)}
    ptx = {found for line in lines_of(cuobjdump, "--list-ptx", library) for found in re.findall(r"\.sm_(\d+)", line)}
    return real | {f"compute_{number}" for number in ptx}


def read_kernels(cuobjdump, library, arch):
    """Kernels of one architecture, by demangled name."""
    kernels = {}
    kernel = None
    for line in lines_of(cuobjdump, "-res-usage", "-arch", arch, library):
        if found := re.match(r"\s*Function ([^\s:]+):", line):
            kernel = kernels.setdefault(found.group(1), Kernel(found.group(1), arch))
        elif kernel is not None and "REG:" in line:
            kernel.resources = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            kernel = None
    for line in lines_of(cuobjdump, "-sass", "-arch", arch, library):
        if found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels[found.group(1)]
        elif kernel is not None and (found := INSTRUCTION.match(line)):
            kernel.count(found.group(1))
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(kernels), stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    for kernel, name in zip(kernels.values(), demangled, strict=True):
        kernel.name = name.replace("(anonymous namespace)::", "")
    return sorted(kernels.values(), key=lambda kernel: kernel.name)


def print_details(kernels):
    head = f"{'regs':>4} {'stack':>5} {'shared':>6}  {'load 128':>8} {'64':>4} {'32':>4} {'<32':>4}"
    head += f"  {'store 128':>9} {'64':>4} {'32':>4} {'<32':>4}  {'generic':>7} {'local':>5}"
    template = None
    for kernel in kernels:
        if kernel.template != template:
            template = kernel.template
            print(f"\n{template}\n{head}")
        cells = {"load": [], "store": []}
        for which, columns in cells.items():
            wide = kernel.accesses[which, 128] + kernel.accesses[which, 256]
            narrow = kernel.accesses[which, 16] + kernel.accesses[which, 8]
            columns += [wide, kernel.accesses[which, 64], kernel.accesses[which, 32], narrow]
        load, store = cells["load"], cells["store"]
        print(
            f"{kernel.resources['REG']:4} {kernel.stack_bytes:5} {kernel.shared_bytes:6}"
            f"  {load[0]:8} {load[1]:4} {load[2]:4} {load[3]:4}  {store[0]:9} {store[1]:4} {store[2]:4} {store[3]:4}"
            f"  {kernel.n_generic:7} {kernel.n_local:5}  {kernel.arguments}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--archs", default=",".join(ARCHITECTURES), help="what it must hold (default: %(default)s)")
    args = parser.parse_args()
    cuobjdump = tool("cuobjdump")
    held, expected = architectures(cuobjdump, args.library), args.archs.split(",")
    missing = [arch for arch in expected if arch not in held]
    by_number = sorted(held, key=lambda arch: (arch[0] == "c", int(re.search(r"\d+", arch).group())))
    print(f"{args.library}: {args.library.stat().st_size:,} bytes, {', '.join(by_number)}")
    faults = {f"{arch} is missing from the library": [] for arch in missing}  # and the architectures that have them
    real = [arch for arch in by_number if arch.startswith("sm_")]
    summary = []
    for arch in real:
        kernels = read_kernels(cuobjdump, args.library, arch)
        if not kernels:
            faults[f"{arch} holds no kernel"] = []
            continue
        if arch == (IN_DETAIL if IN_DETAIL in real else real[-1]):
            print_details(kernels)
        most = max(kernels, key=lambda kernel: kernel.resources["REG"])
        found = [f"{kernel.template}<{kernel.arguments}> {fault}" for kernel in kernels for fault in kernel.faults()]
        for fault in found:
            faults.setdefault(fault, []).append(arch)
        n_local = sum(bool(kernel.stack_bytes or kernel.n_local) for kernel in kernels)
        summary.append(
            f"{arch:>7} {len(kernels):7} {most.resources['REG']:8}"
            f" {max(kernel.shared_bytes for kernel in kernels):6} {n_local:12}"
            f" {sum(kernel.accesses['load', 128] + kernel.accesses['load', 256] for kernel in kernels):12}"
            f" {sum(kernel.n_generic for kernel in kernels):8} {len(found):6}"
        )
    print(f"\n{'arch':>7} kernels max regs shared local memory loads of 128  generic faults", *summary, sep="\n")
    print("", *(f"{fault}{': ' * bool(archs)}{', '.join(archs)}" for fault, archs in faults.items()), sep="\n")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
