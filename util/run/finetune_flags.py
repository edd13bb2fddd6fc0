"""Flags of fine-tuning, and their checks that need no data."""

import argparse

from timm.layers import to_2tuple

from util.io.errors import UserError
from util.run.checks import check_ranges, check_shared, refuse, warn_ignored

LINEAR_PROBE = dict(  # defaults of --linear_probe: arXiv 2111.06377, appendix A.1, batch size 16384
    blr=0.1,
    weight_decay=0.0,
    epochs=90,
    warmup_epochs=10,
    min_lr=0.0,
    drop_path=0.0,
    smoothing=0.0,
    aa="",
    reprob=0.0,
    global_pool=False,
)
RANGES = {
    **dict.fromkeys("drop_path smoothing".split(), "[0, 1)"),
    **dict.fromkeys("reprob mixup_prob mixup_switch_prob cutmix_minmax".split(), "[0, 1]"),
    **dict.fromkeys("mixup cutmix color_jitter".split(), "[0, 1000]"),
    "layer_decay": "(0, 1]",
    "nb_classes": "[1, 1000000]",
    "recount": "[1, 1000]",
}


def add_finetune_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that only fine-tuning has."""
    add_model_flags(parser.add_argument_group("classifier"))
    add_augmentation_flags(parser.add_argument_group("augmentation"))
    add_evaluation_flags(parser.add_argument_group("evaluation"))
    parser.set_defaults(global_pool=True)


def add_model_flags(group) -> None:
    group.add_argument("--model", default="vit_large_patch16", help="name in models_vit.py")
    group.add_argument("--nb_classes", type=int, help="number of classes (default: the data's)")
    group.add_argument(
        "--drop_path",
        type=float,
        default=0.1,
        help="stochastic depth of the last block (default: 0.1)",
    )
    group.add_argument(
        "--global_pool", action="store_true", help="classify the mean patch token (the default)"
    )
    group.add_argument(
        "--cls_token", action="store_false", dest="global_pool", help="classify the class token"
    )
    group.add_argument(
        "--finetune",
        default="",
        help="pre-trained checkpoint to start from: a file, an https:// or hf:// URL",
    )
    group.add_argument(
        "--layer_decay",
        type=float,
        default=0.75,
        help="factor on the learning rate per layer (default: 0.75)",
    )
    group.add_argument(
        "--linear_probe",
        action="store_true",
        help="train a linear classifier on the frozen encoder of --finetune, with MAE's recipe as "
        "defaults: LARS, blr 0.1, no weight decay, 90 epochs, warm-up 10, crop and flip only, "
        "class token",
    )


def add_augmentation_flags(group) -> None:
    group.add_argument(
        "--color_jitter", type=float, help="strength of color jitter; used with an empty --aa"
    )
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="timm's auto-augment policy, '' for none (default: rand-m9-mstd0.5-inc1)",
    )
    group.add_argument(
        "--smoothing", type=float, default=0.1, help="label smoothing (default: 0.1)"
    )
    group.add_argument(
        "--reprob", type=float, default=0.25, help="probability of random erasing (default: 0.25)"
    )
    group.add_argument(
        "--remode",
        choices=["const", "rand", "pixel"],
        default="pixel",
        help="fill value of random erasing (default: pixel)",
    )
    group.add_argument("--recount", type=int, default=1, help="erased areas (default: 1)")
    group.add_argument("--resplit", action="store_true", help="no effect: kept for older commands")
    group.add_argument("--mixup", type=float, default=0, help="alpha of mixup (default: 0, off)")
    group.add_argument("--cutmix", type=float, default=0, help="alpha of cutmix (default: 0, off)")
    group.add_argument(
        "--cutmix_minmax",
        type=float,
        nargs="+",
        help="smallest and largest fraction cut, instead of --cutmix",
    )
    group.add_argument(
        "--mixup_prob", type=float, default=1.0, help="probability of mixing a batch (default: 1)"
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=float,
        default=0.5,
        help="probability of cutmix when both are on (default: 0.5)",
    )
    group.add_argument(
        "--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="(default: batch)"
    )


def add_evaluation_flags(group) -> None:
    group.add_argument("--eval", action="store_true", help="only evaluate the --resume checkpoint")
    group.add_argument(
        "--dist_eval", action="store_true", help="split the validation set over the ranks"
    )
    group.add_argument(
        "--report",
        default="",
        metavar="FOLDER",
        help="with --eval: per-class accuracy and confusion matrix as CSV and PNG files",
    )
    group.add_argument(
        "--predict",
        default="",
        metavar="FOLDER",
        help="classify the images in FOLDER with the --resume checkpoint; needs no labels and "
        "writes predictions.csv to the output folder",
    )


def is_mixing(args) -> bool:
    """Whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def check_flags(args, parser) -> None:
    """Refuse flags that cannot act, and warn about those that have no effect.

    Raises:
        UserError: with the flag and the remedy.
    """
    check_shared(args)
    check_ranges(args, RANGES)
    mixes, minmax = is_mixing(args), args.cutmix_minmax or [0, 1]
    refuse(
        [
            (
                mixes and args.batch_size % 2 == 1 and not args.eval,
                f"Mixup pairs images: --batch_size {args.batch_size} must be even.",
            ),
            (
                bool(args.eval or args.predict) and args.resume in ("", "auto"),
                "--eval and --predict need a fine-tuned checkpoint: add --resume FILE.",
            ),
            (
                args.eval and bool(args.predict),
                "--eval needs labels and --predict takes images without: give one of them.",
            ),
            (
                bool(args.report) and not args.eval,
                "--report describes an evaluation: add --eval --resume FILE.",
            ),
            (
                args.linear_probe and (mixes or args.drop_path > 0),
                "--linear_probe trains a frozen encoder: leave out mixup and drop path.",
            ),
            (
                args.linear_probe and not (args.finetune or args.resume),
                "--linear_probe needs a pre-trained encoder: add --finetune FILE.",
            ),
            (
                args.linear_probe and args.batch_size == 1,
                "--linear_probe uses BatchNorm, which needs a --batch_size of 2 or more.",
            ),
            (
                len(minmax) != 2 or minmax[0] > minmax[-1],
                "--cutmix_minmax takes two fractions from 0 to 1, the smaller one first.",
            ),
        ]
    )
    warn_ignored(args, parser, ignored_flags(args))


def check_cutmix(args) -> None:
    """Raises UserError where no whole number of pixels lies in the --cutmix_minmax range."""
    for side in to_2tuple(args.input_size) if args.cutmix_minmax else ():
        low, high = (int(side * fraction) for fraction in args.cutmix_minmax)
        if low >= high:
            raise UserError(
                f"--cutmix_minmax {args.cutmix_minmax} cuts from {low} to {high} of {side} pixels; "
                "widen the range."
            )


def ignored_flags(args) -> dict[str, str]:
    """Flags without effect in this run, with the reason."""
    ignored = {"finetune": "--resume has all weights"} if args.resume not in ("", "auto") else {}
    if args.aa:
        ignored["color_jitter"] = "--aa sets the colors (--aa '' leaves them)"
    if not is_mixing(args):
        names = ("mixup_prob", "mixup_switch_prob", "mixup_mode")
        ignored |= dict.fromkeys(names, "nothing is mixed without --mixup or --cutmix")
    if args.linear_probe:
        ignored["layer_decay"] = "--linear_probe trains the head alone"
    if args.eval or args.predict:
        names = ("compile", "mixup", "cutmix", "cutmix_minmax", "layer_decay", "clip_grad")
        ignored |= dict.fromkeys(names, "nothing is trained")
    if args.predict:
        names = ("input_size", "patch_size", "in_chans", "mean", "std", "skip_bad_images")
        ignored |= dict.fromkeys(names, "--predict prepares images as the checkpoint says")
    return ignored
