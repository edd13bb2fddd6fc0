"""The tables in the documents are those that docs/results gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def printed() -> str:
    """What scripts/experiments/tables.py prints, in a process of its own."""
    done = run_python("scripts/experiments/tables.py")
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@pytest.mark.slow
def test_experiments_run(tmp_path):
    """Pre-training, kNN, probe and fine-tuning of an epoch each; a second call measures nothing."""
    code = """if True:
        import sys
        from argparse import Namespace
        from pathlib import Path
        import common, pretraining_helps, what_is_read
        from pretraining_helps import DATA, PIXELS, TASKS, Experiment
        common.RESULTS = out = Path(sys.argv[1])
        short = dict(epochs=1, few=(1, 40), full=1, long=(2, 2), labels=("5",), every=1)
        short |= dict(pretrain="--warmup_epochs 0 --batch_size 200", seeds=1)
        short |= dict(probe="--epochs 1 --warmup_epochs 0 --batch_size 200")
        DATA["digits"] = DATA["digits"]._replace(**short)
        args = Namespace(out=out, jobs=2, source="", tasks=TASKS, labels=None, seeds=None)
        args.arms = [PIXELS, "crossmae 0.75", "mae", "scratch, long"]
        Experiment("digits", args).run()
        Experiment("digits", args).run()
        what_is_read.main(Namespace(out=out, seeds=1))
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT / "scripts/experiments", capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        for name in ("pretraining-digits", "finetuning-digits", "what_is_read")
    }
    assert [len(x) for x in rows.values()] == [3, 5, 2]
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 3 + 5 + 2
    accuracies = {(r["task"], r["arm"], r["labels"]): r["acc1"] for r in rows["finetuning-digits"]}
    assert len(accuracies) == 5 and all(0 <= x <= 100 for x in accuracies.values())
    (mae,) = [row for row in rows["what_is_read"] if row["arm"] == "mae"]
    masses = zip(mae["visible"], mae["masked"], mae["class token"], strict=True)
    assert all(abs(sum(mass) - 1) < 1e-5 for mass in masses)


def test_costs_are_those_of_the_models():
    """FLOPs and parameters, counted on the meta device, as docs/results/cost.json has them."""
    stored = json.loads((ROOT / "docs/results/cost.json").read_text())["rows"]
    small = [row for row in stored if row["size"] == "S/16"]
    assert len(small) == 7
    code = "import cost, json; print(json.dumps([cost.measure(m, 'S/16') for m in cost.MODELS]))"
    done = run_python("-c", code, cwd=ROOT / "scripts/experiments")
    keys = ("gflop", "mparams", "known_gflop", "known_mparams")
    found = [tuple(row[key] for key in keys) for row in json.loads(done.stdout)]
    assert sorted(found) == sorted(tuple(row[key] for key in keys) for row in small)
