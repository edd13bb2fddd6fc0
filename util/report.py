"""What a trained model makes of pictures: features, predictions, and the tables drawn from them.

For the scripts and the tools; each call works on one process, `count_confusion` on several.

Letters: B images, C channels, H height, W width, D encoder width, L patches, K classes.
"""

import contextlib
import csv
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from util.datasets import Images, Reader, build_transform, read_list
from util.distributed import all_reduce_sum, choose_device, is_main_process
from util.images import find_images, open_image
from util.loaders import DeviceLoader, build_eval_loader
from util.optim import AMP_TYPES, autocast, choose_amp_dtype
from util.pictures import INK, PAPER, font

logger = logging.getLogger(__name__)

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)
FEATURES = ("cls", "mean", "patches")
UNEQUAL = 2  # times as many pictures in the largest class as in the smallest: worth a sentence
LINES = (200, 200, 200)
DARKEST = (8, 48, 107)  # a cell that holds its whole row
TEXT_SIZE = 11


def add_evaluation_flags(parser, batch_size: int = 64) -> None:
    """Flags of a tool that runs a checkpoint over pictures."""
    parser.add_argument(
        "--checkpoint", required=True, help="of main_pretrain.py or main_finetune.py: file or URL"
    )
    parser.add_argument(
        "--model", help="name of the model, needed only where the checkpoint does not say it"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=batch_size,
        help="images per forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=DEFAULT_WORKERS,
        help="loader processes (default: %(default)s here)",
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--amp",
        choices=["auto", *AMP_TYPES],
        default="off",
        help="autocast type; off is float32, the same numbers on every machine (default: off)",
    )


def set_evaluation(args, flags) -> None:
    """Put into the arguments of a checkpoint how this tool runs; what the pictures are stays.

    Raises:
        ValueError: a flag is out of its range, or there is no such device.
    """
    if flags.batch_size < 1:
        raise ValueError(f"--batch_size is {flags.batch_size}; it must be at least 1.")
    if flags.num_workers < 0:
        raise ValueError(f"--num_workers is {flags.num_workers}; it must not be negative.")
    args.device = choose_device(flags.device, local_rank=0)
    args.batch_size, args.num_workers = flags.batch_size, flags.num_workers
    args.amp, args.pin_mem, args.prefetch, args.seed = flags.amp, True, 2, 0


def describe_transform(args) -> str:
    """The evaluation transform in words."""
    chain = build_transform(False, args).transforms
    resize, crop = chain[0], chain[1]
    side = getattr(resize, "size", None)
    resize_text = f"short side {side}" if side else f"cover {resize.height} x {resize.width}"
    mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (args.mean, args.std))
    return (
        f"evaluation transform: {resize_text}, centre crop {crop.size[0]} x {crop.size[1]}, "
        f"mean {mean}, std {std}; no augmentation"
    )


def list_files(sources: Iterable[str]) -> list[str]:
    """Picture files: those named, those in the lists (.txt) named, and all below the folders named,
    in a fixed order.

    Raises:
        FileNotFoundError: something named is not there, or a folder holds no picture.
    """
    files = []
    for source in sources:
        if os.path.isdir(source):
            found = list(find_images(source))
            if not found:
                raise FileNotFoundError(f"There is no picture in {source}; name another folder.")
            files += found
        elif os.path.exists(source) and str(source).endswith(".txt"):
            files += [path for path, _ in read_list(Path(source))]
        elif os.path.exists(source):
            files.append(str(source))
        else:
            raise FileNotFoundError(f"There is no file or folder {source}; check the path.")
    return files


def build_files_loader(samples, classes: list[str], args) -> DeviceLoader:
    """Loader of (path, class number) pictures in order, prepared as in evaluation."""
    reader = Reader(open_image, args.in_chans)
    dataset = Images(samples, classes, build_transform(False, args), reader)
    return build_eval_loader(dataset, args, split=False)


@torch.inference_mode()
def run_batches(
    function: Callable[[Tensor], Tensor], loader, device, amp: str = "off", title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """function(imgs) in float32 and labels (B,), batch by batch, on the device.

    Shows a bar on a terminal and nothing in a pipe.
    """
    amp_dtype = choose_amp_dtype(amp, device)
    hidden = None if is_main_process() else True  # None: hidden unless on a terminal
    for imgs, labels in tqdm(loader, desc=title, unit="batch", disable=hidden):
        with autocast(device, amp_dtype):
            outputs = function(imgs.to(device, non_blocking=True))
        yield outputs.float(), labels.to(device, non_blocking=True)


def run_features(
    model: nn.Module, loader, which: str, device, amp: str = "off", title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features of whole pictures and labels (B,), batch by batch.

    Args:
        which: "cls" or "mean" (B, D), or "patches" (B, L, D) in raster order.
    """
    model.eval()
    return run_batches(
        lambda imgs: getattr(model.forward_features(imgs), which), loader, device, amp, title
    )


def default_feature(model: nn.Module) -> str:
    """What the model's own head reads; of a pre-training model the class token."""
    return "mean" if getattr(model, "global_pool", False) else "cls"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to. It becomes `path` when the block ends well and is removed otherwise.

    Raises:
        OSError: the place cannot be written to; before the block begins.
    """
    path = Path(path)
    waiting = path.with_name(f"{path.stem}.tmp.{os.getpid()}{path.suffix}")
    if path.is_dir():
        raise OSError(f"Cannot write {path}: it is a folder; name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting.touch()
        mode = waiting.stat().st_mode  # as the user's umask has it; some libraries set their own
    except OSError as error:
        raise OSError(f"Cannot write {path} ({error.strerror}); choose another place.") from error
    try:
        yield waiting
        waiting.chmod(mode)
        os.replace(waiting, path)
    finally:
        waiting.unlink(missing_ok=True)


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
    loader = build_files_loader([(file, 0) for file in files], classes, args)
    count = min(5, len(classes))
    header = ["file", "class", "probability"]
    header += [name for i in range(2, count + 1) for name in (f"class_{i}", f"probability_{i}")]
    names = iter(files)
    with whole_file(out) as waiting, open(waiting, "w", newline="", encoding="utf-8") as file:
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
    with whole_file(folder / "confusion.png") as waiting:
        draw_confusion(matrix, classes).save(waiting)
    notes = [accuracy_note(matrix), imbalance_note(matrix.sum(dim=1).tolist(), classes)]
    return [note for note in [*notes, few_classes_note(len(classes))] if note]


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    with whole_file(path) as waiting, open(waiting, "w", newline="", encoding="utf-8") as file:
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
