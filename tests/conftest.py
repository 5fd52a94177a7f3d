"""Settings of all tests."""

import os
from pathlib import Path

import pytest
from preloaded import Preloaded

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


@pytest.fixture(scope="session")
def command_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of every command: offline, without keys, with a model cache of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "HF_", "RLAIF_"))}
    return env | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "RLAIF_CACHE": str(tmp_path_factory.mktemp("models")),
        "RLAIF_AUTO_DTYPE": "float32",  # on every CPU
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "agg",
        # Tiny models gain nothing from a second thread, and its busy waiting starves the test that watches them.
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def preloaded(command_env: dict[str, str]) -> Preloaded:
    """Runs commands and scripts without importing everything anew."""
    return Preloaded(command_env)


@pytest.fixture
def server():
    """A programmable server (``tests/engines/fake_server.py``), fresh for each test."""
    from fake_server import FakeServer

    fake = FakeServer()
    yield fake
    fake.close()
