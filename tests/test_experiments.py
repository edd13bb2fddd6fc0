"""The tables in the documents are those that docs/results gives."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def printed() -> str:
    """What scripts/experiments/tables.py prints, in a process of its own."""
    command = [sys.executable, "scripts/experiments/tables.py"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("document", ["docs/experiments.md", "docs/performance.md"])
def test_tables_are_up_to_date(document, printed):
    """Every marked table is printed by the script, line for line."""
    text = (ROOT / document).read_text()
    tables = [part.partition("\n<!-- end -->")[0] for part in text.split("<!-- table: ")[1:]]
    assert tables
    for table in tables:
        name, _, body = table.partition(" -->\n")
        assert f"{name}\n\n{body}\n" in printed, f"{name}: run tables.py --write"
