"""--predict: classify unlabelled images with a fine-tuned checkpoint."""

import logging
from pathlib import Path

from util.build import load_trained
from util.data.remote import localize
from util.data.sources import list_images
from util.eval.report import name_classes, predict_files
from util.io.errors import UserError
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
