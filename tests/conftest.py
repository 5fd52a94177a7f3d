"""Settings of all tests."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """Two threads, unless the caller set another number. The model cache stays the user's, so nothing is rebuilt."""
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))
    import torch

    torch.set_num_threads(threads)
