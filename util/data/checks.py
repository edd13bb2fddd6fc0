"""Checks of fine-tuning's flags against the data, before any image is read."""

import logging
from pathlib import Path

from util.data.labels import check_same_classes, find_labels
from util.data.transforms import build_transform
from util.io.checkpoint_file import weights_of
from util.io.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_POLICY = "rand-m9-mstd0.5-inc1"


def drop_default_policy(args) -> None:
    """Without 3 channels, replace the default --aa, which works on colors, by none."""
    if args.in_chans != 3 and args.aa == DEFAULT_POLICY:
        args.aa = ""
        logger.info("Without --aa: it works on 3 channels")


def check_augmentation(args) -> None:
    """Raises UserError if --aa is not a policy, or works on colors and there are none."""
    if args.in_chans != 3 and (args.aa or args.color_jitter):
        raise UserError("--aa and --color_jitter work on 3 channels; leave them out (--aa '').")
    try:
        build_transform(True, args)
    except (AssertionError, ValueError) as error:  # timm's answers to an unknown policy
        raise UserError(
            f"--aa {args.aa} is not a policy of timm; {DEFAULT_POLICY}, augmix-m5-w4-d2 and "
            "original-mstd0.5 are, '' is none."
        ) from error


def check_trained_classes(args, checkpoint: dict) -> None:
    """Take the order of the classes from a checkpoint, as far as it names them.

    Raises:
        UserError: checkpoint and data have different classes.
    """
    names = find_labels(Path(args.data_path, "val"))
    head = weights_of(checkpoint, args.resume).get("head.bias")
    trained_on = list(checkpoint.get("class_names") or names)
    count = len(trained_on)
    if not checkpoint.get("class_names") and head is not None:
        count = head.numel()
    args._classes = trained_on
    if set(trained_on) != set(names) or count != len(names):
        mismatched = ", ".join(sorted(set(trained_on) ^ set(names))[:3])
        raise UserError(
            f"{args.resume} was trained on {count} classes, {args.data_path} has {len(names)}"
            f"{f' (they differ in {mismatched})' if mismatched else ''}; use the data set it "
            "belongs to."
        )


def check_classes(args) -> None:
    """Compare the classes of train/ and val/, choose their order, and set or check --nb_classes.

    Looks at folder names or the index of shards only, so it is quick for a million images.

    Raises:
        UserError: training and validation classes differ, or --nb_classes is not their count.
    """
    splits = ["val"] if args.eval else ["train", "val"]
    classes, *others = (find_labels(Path(args.data_path, split)) for split in splits)
    for other in others:
        check_same_classes(args.data_path, classes, other)
    args._classes = classes
    if args.nb_classes is None:
        args.nb_classes = len(classes)
    elif args.nb_classes != len(classes):
        raise UserError(
            f"--nb_classes is {args.nb_classes} but {args.data_path} has {len(classes)} "
            "classes; correct the flag or leave it out."
        )
