"""--predict: classify unlabeled images with a fine-tuned checkpoint."""

import csv
import logging
from pathlib import Path

from torch import nn

from util.build import load_trained
from util.data.remote import localize
from util.data.sources import list_images
from util.eval.inference import build_inference_loader, run_batches
from util.eval.report import NAMES
from util.io.errors import UserError
from util.io.files import atomic_write
from util.optim import choose_amp_dtype
from util.run.output_dir import move_to_previous, prepare_output

logger = logging.getLogger(__name__)


def predict(args) -> None:
    """Write predictions.csv; everything about model and images comes from the checkpoint.

    Raises:
        UserError: the checkpoint is not a classifier.
    """
    model, trained = load_trained(args.resume, model=args.model, model_ema=args.model_ema)
    if model.kind != "classifier":
        raise UserError(
            f"{args.resume} is a pre-training checkpoint, which has no classes; --predict needs a "
            "fine-tuned one."
        )
    for name in ("device", "batch_size", "num_workers", "pin_mem", "prefetch"):
        setattr(trained, name, getattr(args, name))
    trained.amp_dtype = choose_amp_dtype(args.amp, args.device)
    prepare_output(args)
    source = localize(args.predict, args.shard_cache, "")
    files = [file for file, _ in list_images(source).samples]  # shards: on every rank
    if args.rank == 0:
        path = Path(args.output_dir or ".", "predictions.csv")
        move_to_previous(path.parent, [path])
        classes = name_classes(trained, trained.nb_classes)
        predict_files(model.to(args.device), files, classes, trained, path)
        logger.info("Predictions in %s", path)


def name_classes(args, num_classes: int) -> list[str]:
    """Class names of a checkpoint; class indices if it has none."""
    names = list(getattr(args, "class_names", None) or [])
    return names if len(names) == num_classes else [str(k) for k in range(num_classes)]


def predict_files(
    model: nn.Module, files: list[str], classes: list[str], args, out: str | Path
) -> None:
    """Write a CSV: file, class, probability, then the next most probable classes, up to five.

    Args:
        classes: names by class index.
        args: in_chans, input_size, mean, std; device, amp_dtype, batch_size, num_workers, pin_mem,
            prefetch.
    """
    model.eval()
    loader = build_inference_loader([(file, 0) for file in files], classes, args)
    count = min(5, len(classes))
    header = ["file", "class", "probability"]
    header += [name for i in range(2, count + 1) for name in (f"class_{i}", f"probability_{i}")]
    names = iter(files)
    with atomic_write(out) as tmp_path, open(tmp_path, "w", newline="", **NAMES) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for logits, _ in run_batches(model, loader, args.device, args.amp_dtype, "predict"):
            best = logits.softmax(dim=1).topk(count, dim=1)
            for probs, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                row = [next(names)]
                for prob, label in zip(probs, labels, strict=True):
                    row += [classes[label], f"{prob:.6f}"]
                writer.writerow(row)
