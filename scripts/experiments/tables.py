"""Print the tables of docs/experiments.md and docs/performance.md from docs/results.

    python scripts/experiments/tables.py          # print them
    python scripts/experiments/tables.py --write  # put them between <!-- table: NAME --> and
                                                  # <!-- end --> in the documents

Mean ± standard deviation over seeds; of seconds median, minimum and maximum.
"""

import argparse
import re
import statistics
from collections.abc import Iterable

import ablations
import common
import speed

DOCUMENTS = ("docs/experiments.md", "docs/performance.md")
ARMS = ["crossmae 0.75", "crossmae 0.25", "mae", "scratch", "scratch, long"]
PAIRS = [
    ("crossmae 0.75", "scratch"),
    ("crossmae 0.75", "scratch, long"),
    ("crossmae 0.75", "mae"),
    ("crossmae 0.75", "crossmae 0.25"),
]


def rows_of(name: str) -> list[dict]:
    """The rows of docs/results/NAME.json."""
    return common.read_results(name)["rows"]


def mean_std(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone for one value."""
    if not values:
        return "-"
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def median_range(seconds: Iterable[float]) -> str:
    """Median (minimum to maximum), because the load of the machine varies."""
    values = [*seconds]
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_seed(rows: list[dict], value: str, **key) -> dict[int, float]:
    """{seed: value} of the rows with this key."""
    return {r["seed"]: r[value] for r in rows if all(r[k] == key[k] for k in key)}


def measures_of(data: str) -> dict[str, dict[str, dict[int, float]]]:
    """{measure: {arm: {seed: accuracy}}}: kNN, linear probe, and fine-tuning per label budget."""
    features = [row for row in rows_of("pretraining") if row["data"] == data]
    trained = [row for row in rows_of("finetuning") if row["data"] == data]
    tuned = [row for row in trained if row["task"] == "fine-tuning"]
    probed = [row for row in trained if row["task"] == "probe"]
    measures = {"kNN": {arm: by_seed(features, "knn", arm=arm) for arm in ARMS}}
    if probed:
        measures["linear probe"] = {arm: by_seed(probed, "acc1", arm=arm) for arm in ARMS}
    budgets = {row["labels"] for row in tuned}
    for n in sorted(budgets, key=lambda n: (not n.isdecimal(), n.zfill(9))):
        name = "all labels" if n == "all" else f"{n} per class"
        measures[name] = {arm: by_seed(tuned, "acc1", arm=arm, labels=n) for arm in ARMS}
    return measures


def accuracy_table(data: str) -> str:
    measures = measures_of(data)
    body = [[arm] + [mean_std([*m[arm].values()]) for m in measures.values()] for arm in ARMS]
    seeds = [str(max(len(seeds) for seeds in m.values())) for m in measures.values()]
    return table(["accuracy, %", *measures], [*body, ["seeds", *seeds]])


def pairs_table(data: str) -> str:
    """Differences of two arms over the seeds that both have."""
    measures, body = measures_of(data), []
    for a, b in PAIRS:
        body.append([f"{a} − {b}"])
        for m in measures.values():
            body[-1].append(
                mean_std([m[a][seed] - m[b][seed] for seed in m[a].keys() & m[b].keys()])
            )
    return table(["paired difference", *measures], body)


def seconds_table(data: str) -> str:
    rows = [row for row in rows_of("pretraining") if row["data"] == data]
    arms = dict.fromkeys(arm for arm in ARMS if by_seed(rows, "seconds", arm=arm))
    values = [median_range(by_seed(rows, "seconds", arm=arm).values()) for arm in arms]
    return table(["pre-training", *arms], [["seconds", *values]])


def ablation_table() -> str:
    rows, body = rows_of("ablations"), []
    for run in ablations.RUNS:
        found = [row for row in rows if row["run"] == run]
        if not found:
            continue
        first = found[0]
        body.append([run, f"{first['gflop'] * 1000:.1f}", f"{first['mparams']:.2f}"])
        body[-1].append(median_range(row["seconds"] for row in found))
        body[-1].append(mean_std([row["losses"][-1] for row in found], 3))
        body[-1].append(mean_std([row["knn"] for row in found]))
    head = ["run", "MFLOP", "million parameters", "seconds", "last loss", "kNN, %"]
    return table(head, body)


def cost_table() -> str:
    rows, body = rows_of("cost"), []
    sizes = ["S/16", "B/16", "L/16", "H/14", "B/16 448"]
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["size"]: row for row in rows if row["model"] == model}
        body.append([model])
        for size in sizes:
            row = found[size]
            known = f" ({row['known_gflop']:g})" if row["known_gflop"] else ""
            body[-1].append(f"{row['gflop']:.2f}{known}, {row['mparams']:.1f}")
    return table(["GFLOP (known), million parameters", *sizes], body)


def speed_table() -> str:
    rows, body = {row["run"]: row for row in rows_of("speed")}, []
    for run in [name for name in speed.RUNS if name in rows]:
        numbers = (rows[run][key] for key in ("images_per_s", "gflop", "mib"))
        body.append([run, *("-" if x is None else f"{x:g}" for x in numbers)])
    head = ["changed", "images/s", "GFLOP per image", "MiB of activations per image"]
    return table(head, body)


def reading_table() -> str:
    masses, body = [row for row in rows_of("what_is_read") if row["arm"] == "mae"], []
    for target in ("visible", "masked", "class token"):
        blocks = list(zip(*(row[target] for row in masses), strict=True))
        sums = [sum(row[target]) for row in masses]
        body.append([target, *(f"{statistics.mean(x):.2f}" for x in blocks)])
        body[-1].append(f"{statistics.mean(sums):.2f}")
    return table(["MAE reads", *(f"block {i + 1}" for i in range(len(body[0]) - 2)), "sum"], body)


def parity_table() -> str:
    body = []
    for row in rows_of("parity"):
        test = row["test"].removeprefix("tests/test_").replace(".py::test_", ": ").replace("_", " ")
        found, allowed = "equal", "equal"
        if row["kind"] != "equal":
            found, allowed = f"{row['difference']:.1e}", f"{row['allowed']:.1e}"
        allowed += " of the value" if row["kind"] == "relative" else ""
        body.append([test, row["quantity"], str(row["comparisons"]), found, allowed])
    return table(["test", "quantity", "comparisons", "worst difference", "allowed"], body)


def all_tables() -> dict[str, str]:
    """{name: text}."""
    tables = {}
    for data in ("digits", "photographs"):
        tables[f"accuracy {data}"] = accuracy_table(data)
        tables[f"pairs {data}"] = pairs_table(data)
        tables[f"seconds {data}"] = seconds_table(data)
    tables |= {"ablations": ablation_table(), "cost": cost_table(), "speed": speed_table()}
    return tables | {"reading": reading_table(), "parity": parity_table()}


def fill(text: str, tables: dict[str, str]) -> str:
    """The text of a document with current tables.

    Raises:
        KeyError: the text names an unknown table.
    """
    pattern = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the documents")
    write, tables = parser.parse_args().write, all_tables()
    for name, text in tables.items():
        print(f"{name}\n\n{text}\n")
    for path in [common.ROOT / document for document in DOCUMENTS] if write else []:
        path.write_text(fill(path.read_text(), tables))
