"""Print the tables of the documents from docs/results.

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
import speed
from pretraining_helps import ALL_ARMS, ARMS, DATA, PIXELS

FEATURES = {"mean": "mean of patches", "cls": "class token", "patches": "all patches"}
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


def median_range(values: list[float]) -> str:
    """Median (minimum to maximum), for times: the load of the machine varies."""
    median = f"{statistics.median(values):.1f}"
    return median if len(values) == 1 else f"{median} ({min(values):.1f} to {max(values):.1f})"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pretraining_table(data: str) -> str:
    """Cost, loss and kNN of pre-training; of raw pixels kNN alone."""
    body = []
    for arm in [PIXELS, *ARMS]:
        for row in rows_of(f"pretraining-{data}", arm=arm):
            cells = ["-"] * 3
            if arm != PIXELS:
                cells = [f"{row['mflop']:.1f}", f"{row['seconds_per_epoch']:.0f}"]
                cells.append(f"{row['losses'][-1]:.3f}")
            cells += [f"{row['knn'][w]:.1f}" if w in row["knn"] else "-" for w in FEATURES]
            body.append([arm, *cells])
    head = ["MFLOP", "seconds per epoch", "last loss"]
    return table(["pre-training", *head, *(f"kNN, {text}" for text in FEATURES.values())], body)


def accuracy_table(data: str, key: str = "acc1") -> str:
    """Mean ± std over seeds of kNN (if they pre-train), linear probe and fine-tuning.

    Args:
        key: acc1 or mean_class.
    """
    labels = [n for n in DATA[data].labels if n != "all"]
    columns = {"linear probe": ("probe", "all")}
    columns |= {f"{n} per class": ("fine-tuning", n) for n in labels}
    columns["all labels"] = ("fine-tuning", "all")
    rows = rows_of(f"finetuning-{data}")
    has_knn = DATA[data].each_pretrains
    body, counts = [], []
    for arm in ALL_ARMS:
        knn = [row["knn"]["mean"] for row in rows_of(f"pretraining-{data}", arm=arm)]
        values = [knn] if has_knn else []
        values += [
            [row[key] for row in rows if (row["arm"], row["task"], row["labels"]) == (arm, *column)]
            for column in columns.values()
        ]
        if any(values):
            body.append([arm, *map(mean_std, values)])
            counts.append([len(x) for x in values])
    seeds = ["seeds", *(str(max(column)) for column in zip(*counts, strict=True))]
    name = {"acc1": "accuracy, %", "mean_class": "mean per-class accuracy, %"}[key]
    return table([name, *["kNN"] * has_knn, *columns], [*body, seeds] if body else [])


def ablation_table(data: str) -> str:
    body = []
    for run in ablations.RUNS[data]:
        if rows := rows_of(f"ablations-{data}", run=run):
            knn = mean_std([row["knn"] for row in rows])
            cells = ["-"] * 4
            if run != PIXELS:
                cells = [f"{rows[0]['mflop']:.1f}", f"{rows[0]['mparams']:.2f}"]
                cells.append(median_range([row["seconds_per_epoch"] for row in rows]))
                cells.append(mean_std([row["losses"][-1] for row in rows], 3))
            body.append([run, *cells, knn])
    head = ["run", "MFLOP", "million parameters", "seconds per epoch", "last loss", "kNN, %"]
    return table(head, body)


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
    tables = {"cost": cost_table(), "speed": speed_table()}
    for data in ("fashion-mnist", "elpv"):
        tables[f"pre-training {data}"] = pretraining_table(data)
    for data in DATA:
        key = "mean_class" if data == "elpv" else "acc1"
        tables[f"accuracy {data}"] = accuracy_table(data, key)
    for data in ablations.RUNS:
        tables[f"ablations {data}"] = ablation_table(data)
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
