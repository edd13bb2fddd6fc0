"""What a classifier makes of pictures: predictions, confusion, accuracy per class; K classes."""

import csv
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from util.distributed import all_reduce_sum
from util.eval.inference import build_inference_loader, run_batches
from util.io.files import atomic_write
from util.vis.figures import INK, PAPER, font

logger = logging.getLogger(__name__)

UNEQUAL = 2  # times as many pictures in the largest class as in the smallest: worth a sentence
LINES = (200, 200, 200)
DARKEST = (8, 48, 107)  # a cell that holds its whole row
TEXT_SIZE = 11


# names of files that are no UTF-8 come out as they are on the disk
NAMES = dict(encoding="utf-8", errors="surrogateescape")


def name_classes(args, num_classes: int) -> list[str]:
    """Class names of a checkpoint; their numbers where it has none."""
    names = list(getattr(args, "class_names", None) or [])
    return names if len(names) == num_classes else [str(k) for k in range(num_classes)]


def predict_files(
    model: nn.Module, files: list[str], classes: list[str], args, out: str | Path
) -> None:
    """Write a CSV: file, class, probability, then the next likely classes, up to five.

    Args:
        files: pictures; no labels are needed.
        classes: names by class number, see `name_classes`.
        args: in_chans, input_size, mean, std; device, amp, batch_size, num_workers.
    """
    model.eval()
    loader = build_inference_loader([(file, 0) for file in files], classes, args)
    count = min(5, len(classes))
    header = ["file", "class", "probability"]
    header += [name for i in range(2, count + 1) for name in (f"class_{i}", f"probability_{i}")]
    names = iter(files)
    with (
        atomic_write(out) as tmp_path,
        open(tmp_path, "w", newline="", **NAMES) as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        for logits, _ in run_batches(model, loader, args.device, args.amp, "predict"):
            best = logits.softmax(dim=1).topk(count, dim=1)
            for shares, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                row = [next(names)]
                for share, number in zip(shares, numbers, strict=True):
                    row += [classes[number], f"{share:.6f}"]
                writer.writerow(row)


def count_confusion(
    loader, model: nn.Module, num_classes: int, device, amp: str = "auto", split: bool = False
) -> Tensor:
    """How often each class was taken for which: counts (K, K), rows true, columns predicted.

    Args:
        split: each process holds another part of the pictures; the counts are added up.
    """
    model.eval()
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    for logits, labels in run_batches(model, loader, device, amp, "confusion"):
        cells = labels * num_classes + logits.argmax(dim=1)
        counts += torch.bincount(cells, minlength=num_classes**2)
    if split:
        all_reduce_sum(counts)
    return counts.view(num_classes, num_classes).cpu()


def write_report(folder: str | Path, matrix: Tensor, classes: list[str]) -> list[str]:
    """Write per_class.csv, confusion.csv and confusion.png; returns what should be said.

    Args:
        matrix: counts (K, K), rows true, columns predicted.
    """
    folder = Path(folder)
    write_csv(folder / "per_class.csv", per_class_rows(matrix, classes))
    head = ["true \\ predicted", *classes]
    rows = [[name, *row] for name, row in zip(classes, matrix.tolist(), strict=True)]
    write_csv(folder / "confusion.csv", [head, *rows])
    with atomic_write(folder / "confusion.png") as tmp_path:
        draw_confusion(matrix, classes).save(tmp_path)
    notes = [accuracy_note(matrix), imbalance_note(matrix.sum(dim=1).tolist(), classes)]
    return [note for note in [*notes, few_classes_note(len(classes))] if note]


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    with (
        atomic_write(path) as tmp_path,
        open(tmp_path, "w", newline="", **NAMES) as file,
    ):
        csv.writer(file).writerows(rows)


def per_class_rows(matrix: Tensor, classes: list[str]) -> list[list]:
    """Table with its heading: accuracy and precision in percent, and the most frequent mistake.

    A share of nothing is left empty.
    """
    rows = [
        "class images correct accuracy predicted precision mistaken_for times".split(),
    ]
    mistakes = matrix.clone().fill_diagonal_(0)
    for number, name in enumerate(classes):
        images, predicted = int(matrix[number].sum()), int(matrix[:, number].sum())
        correct, times = int(matrix[number, number]), int(mistakes[number].max())
        other = classes[int(mistakes[number].argmax())] if times else ""
        shares = [f"{100 * correct / total:.2f}" if total else "" for total in (images, predicted)]
        rows.append([name, images, correct, shares[0], predicted, shares[1], other, times])
    return rows


def accuracy_note(matrix: Tensor) -> str:
    """Acc@1, and the mean of the classes' accuracies, in which every class counts the same."""
    images = matrix.sum(dim=1).double()
    present = images > 0
    if not present.any():
        return "There were no images to judge."
    correct = matrix.diagonal().double()
    of_classes = 100 * (correct[present] / images[present]).mean()
    overall = 100 * correct.sum() / images.sum()
    return f"Mean per-class accuracy {of_classes:.3f}, Acc@1 {overall:.3f}"


def imbalance_note(counts: Sequence[int], classes: Sequence[str]) -> str:
    """A sentence when classes differ much in size or are empty; else ''."""
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
    """A sentence when five guesses are all there are; else ''."""
    if num_classes > 5:
        return ""
    return f"Acc@5 says nothing with {num_classes} classes: five guesses cover them all."


def draw_confusion(matrix: Tensor, classes: list[str]) -> Image.Image:
    """The matrix as a picture: darker, the larger the share of the true class.

    Up to 24 classes with counts, up to 100 with names, above as colours alone.
    """
    num_classes = len(classes)
    cell = 34 if num_classes <= 24 else 14 if num_classes <= 100 else max(1, 1000 // num_classes)
    letters = font(TEXT_SIZE)
    labels = [shorten(name) for name in classes] if num_classes <= 100 else []
    margin = max([30, *(int(letters.getlength(label)) + 12 for label in labels)])
    top, side = margin + 24, num_classes * cell
    picture = Image.new("RGB", (margin + max(side, 330) + 12, top + side + 12), PAPER)
    draw = ImageDraw.Draw(picture)
    title = "rows: true class, columns: predicted; colour: share of the row"
    draw.text((8, 6), title, fill=INK, font=letters)
    cells = color_cells(matrix).resize((side, side), Image.Resampling.NEAREST)
    picture.paste(cells, (margin, top))
    draw.rectangle((margin - 1, top - 1, margin + side, top + side), outline=LINES)
    for number, label in enumerate(labels):
        middle = int((number + 0.5) * cell)
        draw.text((margin - 6, top + middle), label, fill=INK, font=letters, anchor="rm")
        upright = draw_upright(label, letters)
        picture.paste(upright, (margin + middle - upright.width // 2, top - 6 - upright.height))
    if num_classes <= 24:
        draw_counts(draw, matrix, cell, (margin, top), letters)
    return picture


def shorten(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def color_cells(matrix: Tensor) -> Image.Image:
    """Counts (K, K) as a picture with one pixel per cell: white for none to DARKEST for the row."""
    share = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    paper, darkest = torch.tensor(PAPER), torch.tensor(DARKEST)
    colors = paper + share.unsqueeze(2) * (darkest - paper)  # (K, K, 3)
    return Image.fromarray(colors.round().to(torch.uint8).numpy())


def draw_upright(text: str, letters) -> Image.Image:
    """Text that reads from bottom to top."""
    left, top, right, bottom = letters.getbbox(text)
    strip = Image.new("RGB", (max(1, int(right - left)), max(1, int(bottom - top))), PAPER)
    ImageDraw.Draw(strip).text((-left, -top), text, fill=INK, font=letters)
    return strip.rotate(90, expand=True)


def draw_counts(draw, matrix: Tensor, cell: int, corner: tuple[int, int], letters) -> None:
    """The counts that are not 0, light on dark cells."""
    share = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    for row, column in matrix.nonzero().tolist():
        place = corner[0] + (column + 0.5) * cell, corner[1] + (row + 0.5) * cell
        ink = PAPER if share[row, column] > 0.5 else INK
        draw.text(place, str(int(matrix[row, column])), fill=ink, font=letters, anchor="mm")
