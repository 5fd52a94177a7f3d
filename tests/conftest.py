"""Settings of all tests."""

import os

import pytest

# The same arithmetic on every CPU: with AMX, models would be loaded in bfloat16 unless told otherwise.
os.environ.setdefault("RLAIF_AUTO_DTYPE", "float32")


@pytest.fixture(scope="session", autouse=True)
def few_threads():
    """Two threads, or one where tests run side by side, unless the caller set another number.

    The model cache stays the user's, so nothing is rebuilt.
    """
    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", "1" if side_by_side else "2"))
    import torch

    torch.set_num_threads(threads)


@pytest.fixture
def server():
    """A programmable server (``tests/engines/fake_server.py``), fresh for each test."""
    from fake_server import FakeServer

    fake = FakeServer()
    yield fake
    fake.close()
