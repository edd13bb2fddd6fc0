"""Confusion matrix of a classifier, and accuracy per class; K classes."""

import csv
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from util.distributed import all_reduce_sum
from util.io.files import atomic_write
from util.run.output_dir import move_to_previous

logger = logging.getLogger(__name__)

REPORT_FILES = ("per_class.csv", "confusion.csv", "confusion.png")

UNEQUAL = 2  # times as many images in the largest class as in the smallest: worth a note
# file names that are not UTF-8 are written as they are on disk
NAMES = dict(encoding="utf-8", errors="surrogateescape")


def report_evaluation(args, confusion: Tensor, classes: list[str]) -> None:
    """--report: write the tables and figure of a confusion matrix (K, K) of this rank's images."""
    if args.dist_eval:
        all_reduce_sum(confusion)
    if args.rank == 0:
        move_to_previous(Path(args.report), (Path(args.report, name) for name in REPORT_FILES))
        for note in write_report(args.report, confusion.cpu(), classes):
            logger.info("%s", note)
        logger.info("Report in %s", args.report)


def write_report(folder: str | Path, matrix: Tensor, classes: list[str]) -> list[str]:
    """Write per_class.csv, confusion.csv and confusion.png of counts (K, K), rows true, columns
    predicted; returns notes for the user.
    """
    from util.vis.confusion import draw_confusion  # matplotlib, which training does without
    from util.vis.figures import save_figure

    folder = Path(folder)
    write_csv(folder / "per_class.csv", per_class_rows(matrix, classes))
    head = ["true \\ predicted", *classes]
    rows = [[name, *row] for name, row in zip(classes, matrix.tolist(), strict=True)]
    write_csv(folder / "confusion.csv", [head, *rows])
    save_figure(draw_confusion(matrix, classes), folder / "confusion.png")
    notes = [accuracy_note(matrix), imbalance_note(matrix.sum(dim=1).tolist(), classes)]
    return [note for note in [*notes, few_classes_note(len(classes))] if note]


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    with atomic_write(path) as tmp_path, open(tmp_path, "w", newline="", **NAMES) as file:
        csv.writer(file).writerows(rows)


def per_class_rows(matrix: Tensor, classes: list[str]) -> list[list]:
    """Table with its header: accuracy and precision in percent, and the most frequent mistake.

    A percentage of no images is left empty.
    """
    rows = ["class images correct accuracy predicted precision mistaken_for times".split()]
    mistakes = matrix.clone().fill_diagonal_(0)
    for k, name in enumerate(classes):
        images, predicted = int(matrix[k].sum()), int(matrix[:, k].sum())
        correct, times = int(matrix[k, k]), int(mistakes[k].max())
        other = classes[int(mistakes[k].argmax())] if times else ""
        accuracy, precision = (
            f"{100 * correct / total:.2f}" if total else "" for total in (images, predicted)
        )
        rows.append([name, images, correct, accuracy, predicted, precision, other, times])
    return rows


def accuracy_note(matrix: Tensor) -> str:
    """Acc@1, and the mean of the per-class accuracies, in which every class has the same weight."""
    images = matrix.sum(dim=1).double()
    present = images > 0
    if not present.any():
        return "There were no images to evaluate."
    correct = matrix.diagonal().double()
    per_class = 100 * (correct[present] / images[present]).mean()
    overall = 100 * correct.sum() / images.sum()
    return f"Mean per-class accuracy {per_class:.3f}, Acc@1 {overall:.3f}"


def imbalance_note(counts: Sequence[int], classes: Sequence[str]) -> str:
    """A note if classes differ much in size or are empty; else ''."""
    largest = max(range(len(counts)), key=counts.__getitem__)
    filled = [k for k in range(len(counts)) if counts[k]]
    parts = []
    if len(filled) < len(counts):
        parts.append(f"{len(counts) - len(filled)} of {len(counts)} classes have no image here")
    if filled:
        smallest = min(filled, key=counts.__getitem__)
        ratio = counts[largest] / counts[smallest]
        if ratio >= UNEQUAL:
            parts.append(
                f"classes are unequal: {counts[largest]} images of {classes[largest]}, "
                f"{counts[smallest]} of {classes[smallest]} ({ratio:.1f} times as many), so judge "
                "by the mean per-class accuracy as well"
            )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def few_classes_note(num_classes: int) -> str:
    """A note if five guesses cover all classes; else ''."""
    if num_classes > 5:
        return ""
    return f"Acc@5 says nothing with {num_classes} classes: five guesses cover them all."
