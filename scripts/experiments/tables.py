"""The tables of docs/experiments.md, from docs/results: mean ± standard deviation over the seeds.

python scripts/experiments/tables.py
"""

import json
import statistics

import common

ARMS = ["crossmae 0.75", "crossmae 0.25", "mae", "scratch", "scratch, long"]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    if not values:
        return "-"
    more = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{more}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def by_seed(rows: list[dict], value: str, **key) -> dict[int, float]:
    """{seed: value} of the rows with this key."""
    return {r["seed"]: r[value] for r in rows if all(r[k] == key[k] for k in key)}


def paired(rows: list[dict], labels: str, arm: str, other: str) -> str:
    """Difference of two arms over the seeds that both have."""
    a, b = (by_seed(rows, "acc1", arm=x, labels=labels) for x in (arm, other))
    return spread([a[seed] - b[seed] for seed in a.keys() & b.keys()])


def accuracy_tables() -> None:
    features = common.Results("pretraining", ("arm", "seed")).rows
    rows = common.Results("finetuning", ("arm", "labels", "seed")).rows
    budgets = sorted({row["labels"] for row in rows}, key=lambda x: (not x.isdecimal(), x.zfill(9)))
    body = []
    for arm in ARMS:
        seconds = spread(list(by_seed(features, "seconds", arm=arm).values()))
        body.append([arm, seconds, spread(list(by_seed(features, "knn", arm=arm).values()))])
        body[-1] += [
            spread(list(by_seed(rows, "acc1", arm=arm, labels=n).values())) for n in budgets
        ]
    head = ["arm", "pre-training, s", "kNN"] + [f"fine-tuned, {n} per class" for n in budgets]
    print(table(head, body))
    pairs = [("crossmae 0.75", "scratch"), ("crossmae 0.75", "scratch, long")]
    pairs += [("crossmae 0.75", "mae"), ("crossmae 0.75", "crossmae 0.25")]
    body = [[f"{a} − {b}"] + [paired(rows, n, a, b) for n in budgets] for a, b in pairs]
    print(table(["paired difference"] + [f"{n} per class" for n in budgets], body))


def cost_table() -> None:
    rows = common.Results("cost", ("model", "size")).rows
    sizes = ["S/16", "B/16", "L/16", "H/14", "B/16 448"]
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["size"]: row for row in rows if row["model"] == model}
        body.append([model])
        for size in sizes:
            row = found[size]
            known = f" ({row['known_gflop']:g})" if row["known_gflop"] else ""
            body[-1].append(f"{row['gflop']:.2f}{known}, {row['mparams']:.1f}")
    print(table(["GFLOP (known), million parameters", *sizes], body))


def reading_table() -> None:
    rows = common.Results("what_is_read", ("arm", "seed")).rows
    masses = [row for row in rows if row["arm"] == "mae"]
    body = []
    for target in ("visible", "masked", "class token"):
        blocks = list(zip(*(row[target] for row in masses), strict=True))
        sums = [sum(row[target]) for row in masses]
        body.append([target, *(f"{statistics.mean(x):.2f}" for x in blocks)])
        body[-1].append(f"{statistics.mean(sums):.2f}")
    print(table(["MAE reads", *(f"block {i + 1}" for i in range(len(body[0]) - 2)), "sum"], body))


def parity_table() -> None:
    rows = common.Results("parity", ("test", "quantity", "kind")).rows
    body = []
    for row in rows:
        test = row["test"].removeprefix("tests/test_").replace(".py::test_", ": ").replace("_", " ")
        found = "equal" if row["kind"] == "equal" else f"{row['difference']:.1e}"
        allowed = "equal" if row["kind"] == "equal" else f"{row['allowed']:.1e}"
        allowed += " of the value" if row["kind"] == "relative" else ""
        body.append([test, row["quantity"], str(row["comparisons"]), found, allowed])
    print(table(["test", "quantity", "comparisons", "worst difference", "allowed"], body))


if __name__ == "__main__":
    for path in sorted((common.ROOT / "docs/results").glob("*.json")):
        print(f"{path.name}: {json.loads(path.read_text())['machine']}")
    print()
    accuracy_tables()
    cost_table()
    reading_table()
    parity_table()
