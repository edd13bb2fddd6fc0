"""The tables in the documents are those that docs/results gives."""

import json
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


@pytest.mark.parametrize(
    "document", ["docs/experiments.md", "docs/performance.md", "docs/recipes.md"]
)
def test_tables_are_up_to_date(document, printed):
    """Every marked table is printed by the script, line for line."""
    text = (ROOT / document).read_text()
    tables = [part.partition("\n<!-- end -->")[0] for part in text.split("<!-- table: ")[1:]]
    assert tables
    for table in tables:
        name, _, body = table.partition(" -->\n")
        assert f"{name}\n\n{body}\n" in printed, f"{name}: run tables.py --write"


def test_costs_are_those_of_the_models():
    """FLOPs and parameters, counted on the meta device, as docs/results/cost.json has them."""
    stored = json.loads((ROOT / "docs/results/cost.json").read_text())["rows"]
    small = [row for row in stored if row["size"] == "S/16"]
    assert len(small) == 7
    code = "import cost, json; print(json.dumps([cost.measure(m, 'S/16') for m in cost.MODELS]))"
    command = [sys.executable, "-c", code]
    folder = ROOT / "scripts/experiments"
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    keys = ("gflop", "mparams", "known_gflop", "known_mparams")
    found = [tuple(row[key] for key in keys) for row in json.loads(done.stdout)]
    assert sorted(found) == sorted(tuple(row[key] for key in keys) for row in small)
