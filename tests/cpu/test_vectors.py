"""The loops over elements are vectors in the library's machine code: of every rule, stored type and instruction set."""

import os
import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from fastopt._build import native
from optimizers import OPTIMIZERS

RULES = [rule for row in OPTIMIZERS for rule in row.rules]
NARROW = [rule for row in OPTIMIZERS if not row.has_divisions for rule in row.rules]
STORED = ("double", "float", "BFloat16", "Half")
# Functions of the loss, of each stored type, kind of target and whether a gradient is wanted: the fewest operations on
# vectors that all their loops have, exponentials of cross-entropy among them.
LOSS = {"read_row": 50, "row_gradient": 25, "tile_cross_entropy": 30, "write_row": 2, "pointwise_clones": 3}
WIDEST = {"baseline": "xmm", "v3": "ymm", "v4": "zmm"}
ARITHMETIC = re.compile(r"v?(?:add|sub|mul|div|sqrt|fn?m(?:add|sub)\d+)([ps])[sd]$")

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64's machine code"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="needs binutils"),
    pytest.mark.skipif(bool(os.environ.get("FASTOPT_SANITIZE")), reason="sanitizers' checks keep loops from vectors"),
]


@pytest.fixture(scope="module")
def functions():
    """Of each function below in the library, by its name and level, how many operations of each kind it has."""
    library = native.module().__file__
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", library]
    found, name = {}, None
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = _name(start[1])
            continue
        instruction = re.match(r"\s+[0-9a-f]+:\s+(\S+)\s*(.*)", line)
        if name and instruction and (operation := ARITHMETIC.match(instruction[1])):
            width = re.search(r"[xyz]mm", instruction[2])
            found.setdefault(name, Counter())["one" if operation[1] == "s" else width[0]] += 1
    if not any(level == "v4" for *_, level in found):
        pytest.skip("built without levels")
    return found


def _name(symbol):
    """(rule or function, stored type or template arguments, level) of a function that is looked at; None of another."""
    symbol = symbol.replace("fastopt::", "").replace("cpu::", "")
    match = re.match(r".*?\b(\w+)<(.*)>\(.*?(\[clone .*\])?$", symbol)
    if not match:
        return None
    function, arguments, clone = match.groups()
    level = re.search(r"v[34]", clone or "")
    level = level[0] if level else "baseline"
    if function in LOSS:
        return function, arguments, level
    kind = re.fullmatch(r"update_(arrays|narrow|v3|v4|baseline)", function)
    if not kind:
        return None
    rule, stored = re.match(r"(.*>), ?(\w+)", arguments).groups()
    stored = {"HalfV3": "Half", "HalfV4": "Half", "BFloat16V4": "BFloat16"}.get(stored, stored)
    return rule, stored, level if kind[1] == "arrays" else kind[1]


@pytest.mark.parametrize("level", WIDEST)
@pytest.mark.parametrize("stored", STORED)
def test_every_rule_is_vectorized(functions, stored, level):
    """As wide as the level has; what is left at the end is narrower, or one by one."""
    for rule in RULES:
        counts = functions.get((rule.format("double" if stored == "double" else "float"), stored, level))
        assert counts, f"no function for {rule} in {stored}, {level}"
        assert counts[WIDEST[level]] >= 3, f"{rule} in {stored}, {level}, is not vectors: {counts}"


def test_rules_without_divisions_use_narrow_vectors(functions):
    """For processors that have wider ones and gain nothing from them; of 16-bit types each level has its own loop."""
    found = {(rule, stored): counts for (rule, stored, level), counts in functions.items() if level == "narrow"}
    assert set(found) == {(rule.format(stored), stored) for rule in NARROW for stored in STORED[:2]}
    for rule, counts in found.items():
        is_narrow = counts["ymm"] >= 3 and not counts["zmm"]
        assert is_narrow, f"{rule} is not vectors of 256 bits: {counts}"


@pytest.mark.parametrize("level", WIDEST)
@pytest.mark.parametrize("function", LOSS)
def test_every_kind_of_loss_is_vectorized(functions, function, level):
    counts = {kind: found for (name, kind, its), found in functions.items() if (name, its) == (function, level)}
    assert len(counts) >= 20
    for kind, found in counts.items():
        assert found[WIDEST[level]] >= LOSS[function], f"{function} of {kind}, {level}, is not vectors: {found}"
