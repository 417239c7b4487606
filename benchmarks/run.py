"""Times fastopt beside torch: the same work, interleaved in one process, checked before it is timed.

    python benchmarks/run.py [--quick] [--only TEXT] [--json FILE]

Prints a Markdown table. ``ratio`` is the fastest of torch's times over fastopt's; ``of copy`` is a plain copy's time
for the same bytes over fastopt's time. Medians over rounds; in a round the providers take turns, each with one untimed
call and then some 30 ms of timed ones, so small work finds its data in the cache, for all of them alike.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import LOSS_CASES, OPTIMIZER_CASES

import fastopt


def timed(providers, n_rounds, n_inner):
    """Seconds a call of each provider: (median, 10th, 90th percentile), interleaved."""
    times = {name: [] for name in providers}
    for call in providers.values():
        call()
    for _ in range(n_rounds):
        for name, call in providers.items():
            call()
            start = time.perf_counter()
            for _ in range(n_inner):
                call()
            times[name].append((time.perf_counter() - start) / n_inner)
    quantile = lambda values, q: sorted(values)[int(q * (len(values) - 1))]  # noqa: E731
    return {name: [quantile(values, q) for q in (0.5, 0.1, 0.9)] for name, values in times.items()}


def optimizer_providers(case):
    """One step of each implementation on tensors of its own; equal to torch's after three steps."""

    def make(cls, **how):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in case.shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 0.01
        return params, cls(params, **case.options, **how)

    stock = getattr(torch.optim, case.optimizer)
    sides = {"torch": make(stock), "torch foreach": make(stock, foreach=True)}
    if case.optimizer != "RMSprop":
        sides["torch fused"] = make(stock, fused=True)
    sides["fastopt"] = make(getattr(fastopt, case.optimizer))
    for _, optimizer in sides.values():
        for _ in range(3):
            optimizer.step()
    for ours, theirs in zip(sides["fastopt"][0], sides["torch"][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    return {name: optimizer.step for name, (_, optimizer) in sides.items()}


def loss_providers(case, compiled):
    """Forward and backward into a fresh gradient; equal to torch's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.shape, generator=generator).to(case.dtype)
    if case.is_channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    logits.requires_grad_()
    positions = [case.shape[0], *case.shape[2:]]
    target = torch.randint(0, case.shape[1], positions, generator=generator)
    if case.has_probabilities:
        target = torch.randn(case.shape, generator=generator).softmax(1)

    def provider(function):
        def call():
            logits.grad = None
            loss = function(logits, target, label_smoothing=case.label_smoothing)
            loss.backward()
            return loss

        return call

    providers = {"torch": provider(F.cross_entropy)}
    if compiled:
        providers["torch compile"] = provider(torch.compile(F.cross_entropy))
    providers["fastopt"] = provider(fastopt.functional.cross_entropy)
    results = {name: (call().detach(), logits.grad) for name, call in providers.items()}
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results["fastopt"][0], results["torch"][0], rtol=tolerance, atol=tolerance)
    largest = results["torch"][1].abs().max().item()
    torch.testing.assert_close(results["fastopt"][1], results["torch"][1], rtol=tolerance, atol=tolerance * largest)
    return providers


def copy_seconds(n_bytes):
    """A plain copy that moves n_bytes, half of them read and half written."""
    source = torch.ones(max(n_bytes // 8, 1))
    to = torch.empty_like(source)
    return timed({"copy": lambda: to.copy_(source)}, 7, max(1, 10**7 // n_bytes))["copy"][0]


def run(case, kind, args):
    providers = optimizer_providers(case) if kind == "optimizer" else loss_providers(case, args.compile)
    first = timed({"torch": providers["torch"]}, 3, 1)["torch"][0]
    n_inner = max(1, int(3e-2 / first))
    n_rounds = min(
        7 if args.quick else 41, max(5, int((0.5 if args.quick else 4) / (first * n_inner * len(providers))))
    )
    times = timed(providers, n_rounds, n_inner)
    ours = times["fastopt"][0]
    peers = {name: t[0] for name, t in times.items() if name not in ("fastopt", "torch compile")}
    best = min(peers, key=peers.get)
    return {
        "name": case.name,
        "kind": kind,
        "bytes_moved": case.bytes_moved,
        "seconds": {name: dict(zip(("median", "p10", "p90"), t, strict=True)) for name, t in times.items()},
        "fastest_torch": best,
        "ratio": peers[best] / ours,
        "ratio_to_compile": times["torch compile"][0] / ours if "torch compile" in times else None,
        "of_copy": copy_seconds(case.bytes_moved) / ours,
    }


def row(result):
    times = {name: t["median"] * 1e6 for name, t in result["seconds"].items()}
    compiled = f"{result['ratio_to_compile']:.1f}x" if result["ratio_to_compile"] else "-"
    return (
        f"| {result['name']} | {times[result['fastest_torch']]:,.1f} ({result['fastest_torch']}) "
        f"| {times['fastopt']:,.1f} | **{result['ratio']:.2f}x** | {compiled} | {result['of_copy']:.2f} |"
    )


def machine():
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastopt": fastopt.info(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no case that takes seconds")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fastopt.build()
    print(
        "| work | fastest torch, us | fastopt, us | ratio | to compile | of copy |\n|---|---|---|---|---|---|",
        flush=True,
    )
    results = []
    for kind, cases in (("optimizer", OPTIMIZER_CASES), ("loss", LOSS_CASES)):
        for case in cases:
            if args.only in case.name and not (args.quick and case.is_long):
                results.append(run(case, kind, args))
                print(row(results[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
