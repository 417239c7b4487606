"""Describes the machine and the versions that times were taken with."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastopt

_CPU = Path("/sys/devices/system/cpu/cpu0")
_PATHS = ("library", "cuda_library", "cache_dir")  # of this machine alone: results are shown to others


def describe(device, n_threads):
    """As a dict of JSON's types; None where something is unknown."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "n_cpus": os.cpu_count(),
        "caches": _caches() or None,
        "governor": _read(_CPU / "cpufreq/scaling_governor"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": n_threads,
        "gpu": _gpu() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "fastopt": {name: value for name, value in fastopt.info().items() if name not in _PATHS},
    }


def one_line(machine):
    """The parts of a description that a reader asks for first."""
    gpu, ours, commit = machine["gpu"], machine["fastopt"], machine["commit"]
    chip = f"{gpu['name']} driver {gpu['driver']}" if gpu else f"{machine['processor']}, {machine['threads']} threads"
    versions = f"torch {machine['torch']}, Python {machine['python']}, fastopt {ours['version']} ({ours['backend']})"
    return f"{chip}; {versions}{f' at {commit}' if commit else ''}"


def processor():
    """The processor's name as the system gives it."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def last_cache_bytes():
    """Size of the largest cache, or None where it is unknown."""
    sizes = [size for size in _caches().values() if size and size[:-1].isdigit() and size.endswith("K")]
    return max((1024 * int(size[:-1]) for size in sizes), default=None)


def _caches():
    folders = sorted((_CPU / "cache").glob("index*"))
    return {f"L{_read(folder / 'level')} {_read(folder / 'type')}": _read(folder / "size") for folder in folders}


def _gpu():
    properties, query = torch.cuda.get_device_properties(torch.cuda.current_device()), "--query-gpu="
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _output("nvidia-smi", f"{query}driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", f"{query}clocks.max.sm,clocks.max.memory", "--format=csv,noheader"),
    }


def _read(file):
    try:
        return Path(file).read_text().strip() or None
    except OSError:
        return None


def _output(*command):
    """The first line that a program prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
