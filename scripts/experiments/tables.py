"""Print the tables of docs/experiments.md and docs/performance.md from docs/results.

    python scripts/experiments/tables.py          # print them
    python scripts/experiments/tables.py --write  # put them between <!-- table: NAME --> and
                                                  # <!-- end --> in the documents

Mean ± std over seeds; of seconds median, minimum and maximum.
"""

import re
import statistics

import ablations
import common
import cost
import small_data
import speed
from pretraining_helps import ALL_ARMS, DATA

DOCUMENTS = ("docs/experiments.md", "docs/performance.md", "docs/recipes.md")


def rows_of(name: str, **key) -> list[dict]:
    """The rows of docs/results/NAME.json with this key."""
    return [row for row in common.read_results(name)["rows"] if row.items() >= key.items()]


def mean_std(values: list[float], digits: int = 1) -> str:
    """Mean ± std; the mean alone for one value."""
    if not values:
        return "-"
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def median_range(rows: list[dict]) -> str:
    """Seconds: median (minimum to maximum), because the load of the machine varies."""
    values = [row["seconds"] for row in rows]
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measures_of(data: str) -> dict[str, dict[str, dict[int, float]]]:
    """{measure: {arm: {seed: accuracy}}}: kNN, linear probe, and fine-tuning per label budget."""

    def by_arm(rows: list[dict], value: str) -> dict[str, dict[int, float]]:
        return {arm: {r["seed"]: r[value] for r in rows if r["arm"] == arm} for arm in ALL_ARMS}

    measures = {"kNN": by_arm(rows_of("pretraining", data=data), "knn")}
    if probed := rows_of("finetuning", data=data, task="probe"):
        measures["linear probe"] = by_arm(probed, "acc1")
    tuned = rows_of("finetuning", data=data, task="fine-tuning")
    budgets = {row["labels"] for row in tuned}
    for n in sorted(budgets, key=lambda n: (not n.isdecimal(), n.zfill(9))):
        name = "all labels" if n == "all" else f"{n} per class"
        measures[name] = by_arm([row for row in tuned if row["labels"] == n], "acc1")
    return measures


def accuracy_table(data: str) -> str:
    measures = measures_of(data)
    body = [[a, *(mean_std([*m[a].values()]) for m in measures.values())] for a in ALL_ARMS]
    seeds = [str(max(len(seeds) for seeds in m.values())) for m in measures.values()]
    return table(["accuracy, %", *measures], [*body, ["seeds", *seeds]])


def sweep_table() -> str:
    rows = {row["run"]: row for row in rows_of("sweep")}
    body = [
        [run, f"{row['mflop']:.1f}", f"{row['seconds_per_epoch']:.0f}"]
        + [f"{row['losses'][-1]:.3f}", f"{row['knn']:.1f}"]
        for run in small_data.SWEEP
        if (row := rows.get(run))
    ]
    return table(["run", "MFLOP", "seconds per epoch", "last loss", "kNN, %"], body)


def small_pretraining_table(data: str) -> str:
    body = []
    for arm in small_data.ARMS:
        for row in rows_of("small_pretraining", data=data, arm=arm):
            costs = [f"{row['mflop']:.1f}", f"{row['seconds_per_epoch']:.0f}"]
            knn = [f"{row['knn'][which]:.1f}" for which in ("mean", "cls", "patches")]
            body.append([arm, *costs, f"{row['losses'][-1]:.3f}", *knn])
    head = ["MFLOP", "seconds per epoch", "last loss"]
    head += ["kNN, mean of patches", "kNN, class token", "kNN, all patches"]
    return table(["pre-training", *head], body)


def small_finetuning_table(data: str, key: str) -> str:
    """Mean ± std over draws of few labels; key: acc1 or mean_class."""
    rows = rows_of("small_finetuning", data=data)
    columns = {"linear probe, all": ("probe", "all")}
    columns |= {f"{n} per class": ("fine-tuning", n) for n in small_data.DATA[data].labels}
    columns["all labels"] = ("fine-tuning", "all")
    body = []
    for arm in [*small_data.ARMS, "scratch", "scratch, total"]:
        cells = [
            mean_std([r[key] for r in rows if (r["task"], r["labels"], r["arm"]) == (*column, arm)])
            for column in columns.values()
        ]
        if any(cell != "-" for cell in cells):
            body.append([arm, *cells])
    return table([{"acc1": "accuracy, %", "mean_class": "balanced, %"}[key], *columns], body)


def ablation_table() -> str:
    body = []
    for run in ablations.RUNS:
        if rows := rows_of("ablations", run=run):
            flops = [f"{rows[0]['gflop'] * 1000:.1f}", f"{rows[0]['mparams']:.2f}"]
            loss = mean_std([row["losses"][-1] for row in rows], 3)
            knn = mean_std([row["knn"] for row in rows])
            body.append([run, *flops, median_range(rows), loss, knn])
    return table(["run", "MFLOP", "million parameters", "seconds", "last loss", "kNN, %"], body)


def cost_table() -> str:
    def cell(row: dict) -> str:
        known = f" ({row['known_gflop']:g})" if row["known_gflop"] else ""
        return f"{row['gflop']:.2f}{known}, {row['mparams']:.1f}"

    cells = {(row["model"], row["size"]): cell(row) for row in rows_of("cost")}
    models = dict.fromkeys(model for model, _ in cells)
    body = [[model, *(cells[model, size] for size in cost.SIZES)] for model in models]
    return table(["GFLOP (known), million parameters", *cost.SIZES], body)


def speed_table() -> str:
    body = []
    for run in [*speed.CHANGES, *speed.RANKS]:
        for row in rows_of("speed", run=run):
            values = (row[key] for key in ("images_per_s", "gflop", "mib"))
            body.append([run, *("-" if x is None else f"{x:g}" for x in values)])
    head = ["changed", "images/s", "GFLOP per image", "MiB of activations per image"]
    return table(head, body)


def reading_table() -> str:
    rows, body = rows_of("what_is_read", arm="mae"), []
    for target in ("visible", "masked", "class token"):
        blocks = [*zip(*(row[target] for row in rows), strict=True)]
        columns = [*blocks, [sum(row[target]) for row in rows]]
        body.append([target, *(f"{statistics.mean(values):.2f}" for values in columns)])
    return table(["MAE reads", *(f"block {i + 1}" for i in range(len(blocks))), "sum"], body)


def parity_table() -> str:
    body = []
    for row in rows_of("parity"):
        test = row["test"].removeprefix("tests/test_").replace(".py::test_", ": ").replace("_", " ")
        bounds = ["equal", "equal"]
        if row["kind"] != "equal":
            unit = " of the value" if row["kind"] == "relative" else ""
            bounds = [f"{row['difference']:.1e}", f"{row['allowed']:.1e}{unit}"]
        body.append([test, row["quantity"], str(row["comparisons"]), *bounds])
    return table(["test", "quantity", "comparisons", "worst difference", "allowed"], body)


def main(write: bool) -> None:
    tables = {}
    for data in DATA:
        tables[f"accuracy {data}"] = accuracy_table(data)
    tables["sweep"] = sweep_table()
    for data, key in (("fashion-mnist", "acc1"), ("elpv", "mean_class")):
        tables[f"pre-training {data}"] = small_pretraining_table(data)
        tables[f"fine-tuning {data}"] = small_finetuning_table(data, key)
    tables |= {"ablations": ablation_table(), "cost": cost_table(), "speed": speed_table()}
    tables |= {"reading": reading_table(), "parity": parity_table()}
    for name, text in tables.items():
        print(f"{name}\n\n{text}\n")
    marked = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    for path in [common.ROOT / document for document in DOCUMENTS] if write else []:
        text = marked.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}", path.read_text())
        path.write_text(text)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="update the documents")
    main(parser.parse_args().write)
