"""Fixtures of the engine tests."""

from collections.abc import Iterator

import pytest
from fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A programmable server, fresh for each test."""
    fake = FakeServer()
    yield fake
    fake.close()
