"""The fixture that the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prompts.small_rows import questions, write_rows


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", questions(23))
