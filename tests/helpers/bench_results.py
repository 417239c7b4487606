"""Invented results of a benchmark, for the tests of reports and comparisons."""

from fastopt.bench import report


def entry(provider, us, **others):
    return {
        "provider": provider,
        "status": "timed",
        "median_us": us,
        "p10_us": us,
        "p90_us": us,
        "gb_per_s": 1.0,
        "of_copy": 5.0 / us,
        **others,
    }


def result(name, ours_us=2.0, copy_us=5.0, torch_us=6.0, **ours):
    """One case; its fastest torch is the fused one."""
    found = [
        entry("torch for-loop", 1.5 * torch_us),
        entry("torch fused", torch_us, extra_bytes=2_000_000),
        entry("torch compile", 12.0, fastopt_beside_us=4.0),
        {"provider": "apex", "status": "wrong", "reason": "differs by 1, 0.1 allowed"},
        entry("optimi", 10.0),
        {"provider": "bitsandbytes", "status": "not run", "reason": "bitsandbytes has no such thing"},
        {**entry("fastopt", ours_us), "extra_bytes": 0, **ours},
    ]
    whole = {"name": name, "kind": "loss", "bytes_moved": 8, "working": "2 x 4 B = 8 B", "n_rounds": 3}
    return {**whole, "copy": entry("copy", copy_us), "providers": found}


def reported(*results, device="cpu", **others):
    machine = {
        "gpu": None,
        "processor": "some processor",
        "threads": 2,
        "torch": "2.13.0",
        "python": "3.12.0",
        "commit": "abc",
        "fastopt": {"backend": "native-cpu-x", "version": "0.1.0"},
    }
    machine |= others
    return report.to_dict(machine, "python -m fastopt bench", {"device": device}, ["apex"], list(results))
