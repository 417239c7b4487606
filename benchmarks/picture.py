"""Draws the README's picture: some cases of a run of ``python -m fastopt bench``.

python benchmarks/picture.py [RESULTS.json] [PICTURE.png]
"""

import sys
from pathlib import Path

import plot
from table import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/2026-11-27-h100.json"
PICTURE = ROOT / "docs/ratios.png"
CASES = (
    "AdamW: LeNet, 44 k in 10 tensors",
    "AdamW: GPT-2 small, 124 M in 148",
    "AdamW: GPT-2 small, 124 M in 148 bf16",
    "RMSprop: GPT-2 small, 124 M in 148 bf16",
    "cross-entropy 65536 x 1000",
    "cross-entropy 8192 x 32000 bf16",
    "cross-entropy 8192 x 32000 bf16, smoothing",
    "cross-entropy 8 x 21 x 256 x 256",
)


def main(results=RESULTS, picture=PICTURE):
    run = read_json(results)
    plot.save(picture, run | {"results": [result for result in run["results"] if result["name"] in CASES]})


if __name__ == "__main__":
    main(*sys.argv[1:])
