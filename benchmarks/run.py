"""``python benchmarks/run.py [...]`` is ``python -m fastopt bench [...]``."""

import sys

from fastopt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
