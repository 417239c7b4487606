"""One process of a distributed test: runs every check of the tables; rank 0 writes the results by name as JSON.

Launched by torchrun as ``distributed_worker.py FOLDER``; the folder carries checkpoints from one launch to the next.
"""

import datetime
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distributed_checkpoints
import distributed_dtensor_loss
import distributed_loss
import distributed_modes
import distributed_steps

TIMEOUT = datetime.timedelta(seconds=60)  # of a collective: an error in one process must not hang the others
TABLES = (distributed_modes, distributed_steps, distributed_loss, distributed_dtensor_loss, distributed_checkpoints)
CHECKS = {name: check for table in TABLES for name, check in table.CHECKS.items()}


def names(n_processes):
    """The checks that a launch of so many processes runs."""
    return [name for name, check in CHECKS.items() if n_processes in check.n_processes]


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    results = {}
    for name in names(dist.get_world_size()):
        try:
            result = CHECKS[name].run(folder)
        except (Exception, pytest.fail.Exception):
            result = {"error": traceback.format_exc()[-3000:]}
        by_rank = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, result)
        results[name] = by_rank
    if dist.get_rank() == 0:
        part = folder / f"results-{dist.get_world_size()}.part"
        part.write_text(json.dumps(results))
        os.replace(part, part.with_suffix(".json"))
    dist.destroy_process_group()
    # Gloo's threads go on. One that still holds a tensor of the last collective needs the GIL to let go of it; while
    # Python ends there is none to be had, and torch aborts.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
