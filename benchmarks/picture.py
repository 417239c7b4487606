"""Draws the README's picture: some cases of a run of ``python -m fastopt bench``, by its own command.

python benchmarks/picture.py [RESULTS.json] [PICTURE.png]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

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
    run = json.loads(Path(results).read_text(encoding="utf-8"))
    run["results"] = [result for result in run["results"] if result["name"] in CASES]
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder, "chosen.json")
        chosen.write_text(json.dumps(run), encoding="utf-8")
        command = [sys.executable, "-m", "fastopt", "bench", "table", str(chosen), "--png", str(picture)]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
