from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import build


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished sweep of two seeds and four rows."""
    return build(tmp_path / "run")
