"""A person's first hour, from an empty folder and a cache: every command does what the pages say."""

from __future__ import annotations

from pathlib import Path

import pytest
from first_hour import Hour, steps


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path) -> None:
    (tmp_path / "hour").mkdir()
    assert len(list(steps(Hour(tmp_path / "hour")))) == 10
