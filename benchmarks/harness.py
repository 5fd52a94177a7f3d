"""What the benchmarks share: arguments, the machine and its versions, pinning, repeats, and writing the result."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark has; add your own before parsing."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="under a minute: fewer repeats, long parts skipped")
    return result


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
"""The cores that the benchmark was started with."""


def pin(process: int, cores: Sequence[int]) -> bool:
    """Keep a process (0: this one) and those it will start on some cores; false where the system cannot."""
    if not hasattr(os, "sched_setaffinity") or not cores:
        return False
    os.sched_setaffinity(process, cores)
    return True


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, GPU, system and load: what a figure depends on."""
    facts: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(CORES),
        "system": platform.system(),
        "python": platform.python_version(),
        "gpu": gpu(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        facts["processor"] = names[0] if names else facts["processor"]
        if "amx_bf16" in cpuinfo.read_text():
            facts["processor"] += " with AMX"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if hasattr(os, "getloadavg"):
        facts["load_1min"] = round(os.getloadavg()[0], 2)
    return facts


def gpu() -> str | None:
    """Names of the NVIDIA GPUs, or none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(name for name in names if name) or None


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; a package that is not installed is left out."""
    found = {}
    for name in ("rlaif", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of repeats, and all of them in the order they were taken."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": [round(value, 4) for value in values],
    }


def finish(
    name: str,
    ratios: Mapping[str, Any],
    details: Mapping[str, Any],
    packages: Sequence[str],
    quick: bool,
    dtype: str = "float32",
) -> None:
    """Write ``results/NAME.json`` (not after ``--quick``, which measures too little) and print the ratios as JSON.

    A run in another precision than float32 has a file of its own, ``results/NAME_DTYPE.json``.
    """
    file = RESULTS / f"{name}{'' if dtype == 'float32' else f'_{dtype}'}.json"
    result = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "ratios": dict(ratios),
        "details": dict(details),
        "versions": versions(*packages),
        "machine": machine(),
    }
    if quick:
        say(f"--quick: benchmarks/results/{file.name} is left as it is")
    else:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(json.dumps(dict(ratios)))
