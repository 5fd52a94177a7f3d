"""Freed tensors go back to the system."""

import subprocess
import sys

import pytest

# Freed blocks between kept ones, after glibc has raised its threshold: holes, unless they are mapped one by one.
SCRIPT = """
import sys
import torch
from rlaif.models import return_freed_memory

if sys.argv[1] == "yes":
    return_freed_memory()
large = torch.zeros(2**21)
del large
blocks = [torch.zeros(2**19) for _ in range(200)]
before = int(open("/proc/self/statm").read().split()[1])
del blocks[::2]
print((before - int(open("/proc/self/statm").read().split()[1])) * 4096 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize(("asked", "least", "most"), [("yes", 150, 250), ("no", -50, 50)])
def test_memory_between_kept_tensors_is_returned(asked, least, most):
    """100 of 200 blocks of 2 MiB."""
    result = subprocess.run([sys.executable, "-c", SCRIPT, asked], capture_output=True, text=True, check=True)
    assert least < float(result.stdout) < most
