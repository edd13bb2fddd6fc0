"""Flags of fine-tuning, and their checks that need no data."""

import argparse
from functools import partial

from timm.layers import to_2tuple

from util.io.errors import UserError
from util.run.checks import check_ranges, check_shared, is_mixing, warn_ignored
from util.run.flags import add_flag

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
    "model_ema_decay": "[0, 1)",
    "nb_classes": "[1, 1000000]",
    "recount": "[1, 1000]",
}


def add_finetune_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that only fine-tuning has."""
    add_model_flags(partial(add_flag, parser.add_argument_group("classifier")))
    add_augmentation_flags(partial(add_flag, parser.add_argument_group("augmentation")))
    add_evaluation_flags(partial(add_flag, parser.add_argument_group("evaluation")))
    parser.set_defaults(global_pool=True)


def add_model_flags(flag) -> None:
    flag("--model", str, "vit_large_patch16", "name in models_vit.py")
    flag("--nb_classes", int, None, "number of classes (default: the data's)")
    flag("--drop_path", float, 0.1, "stochastic depth of the last block")
    flag("--global_pool", bool, False, "classify the mean patch token (the default)")
    options = dict(action="store_false", dest="global_pool")
    flag("--cls_token", bool, False, "classify the class token", **options)
    text = "pre-trained weights: file, URL, folder of transformers or timm, timm:NAME"
    flag("--finetune", str, "", text)
    flag("--layer_decay", float, 0.75, "factor on the learning rate per layer")
    text = (
        "also keep an exponential moving average of the weights and evaluate it; with --eval and "
        "--predict, use it instead of the weights"
    )
    flag("--model_ema", bool, False, text)
    flag("--model_ema_decay", float, 0.9999, "fraction of the average kept at each optimizer step")
    text = (
        "train a linear classifier on the frozen encoder of --finetune, with MAE's recipe as "
        "defaults: LARS, blr 0.1, no weight decay, 90 epochs, warm-up 10, crop and flip only, "
        "class token"
    )
    flag("--linear_probe", bool, False, text)


def add_augmentation_flags(flag) -> None:
    flag("--color_jitter", float, None, "strength of color jitter; used with an empty --aa")
    flag("--aa", str, "rand-m9-mstd0.5-inc1", "timm's auto-augment policy, '' for none")
    flag("--smoothing", float, 0.1, "label smoothing")
    text = "balanced: weight the loss of a class by 1 / its number of images (mean weight 1)"
    flag("--class_weights", str, "none", text, choices=["none", "balanced"])
    flag("--reprob", float, 0.25, "probability of random erasing")
    modes = ["const", "rand", "pixel"]
    flag("--remode", str, "pixel", "fill value of random erasing", choices=modes)
    flag("--recount", int, 1, "erased areas")
    flag("--resplit", bool, False, "no effect: kept for older commands")
    flag("--mixup", float, 0, "alpha of mixup; 0: off")
    flag("--cutmix", float, 0, "alpha of cutmix; 0: off")
    text = "smallest and largest fraction cut, instead of --cutmix"
    flag("--cutmix_minmax", float, None, text, nargs="+")
    flag("--mixup_prob", float, 1.0, "probability of mixing a batch")
    flag("--mixup_switch_prob", float, 0.5, "probability of cutmix when both are on")
    flag("--mixup_mode", str, "batch", "what is mixed", choices=["batch", "pair", "elem"])


def add_evaluation_flags(flag) -> None:
    flag("--eval", bool, False, "only evaluate the --resume checkpoint")
    text = "what checkpoint-best.pth is the best of: accuracy, or mean per-class accuracy"
    flag("--best_by", str, "acc1", text, choices=["acc1", "mean_class"])
    flag("--dist_eval", bool, False, "split the validation set over the ranks")
    text = "with --eval: per-class accuracy and confusion matrix as CSV and PNG files"
    flag("--report", str, "", text, metavar="FOLDER")
    text = (
        "classify the images in FOLDER with the --resume checkpoint; needs no labels and writes "
        "predictions.csv to the output folder"
    )
    flag("--predict", str, "", text, metavar="FOLDER")


def check_flags(args, parser) -> None:
    """Refuse flags that cannot act, and warn about those that have no effect.

    Raises:
        UserError: with the flag and the remedy.
    """
    check_shared(args)
    check_ranges(args, RANGES)
    if (args.eval or args.predict) and args.resume in ("", "auto"):
        raise UserError("--eval and --predict need a fine-tuned checkpoint: add --resume FILE.")
    if args.eval and args.predict:
        raise UserError("--eval needs labels, --predict takes images without: give one of them.")
    if args.report and not args.eval:
        raise UserError("--report describes an evaluation: add --eval --resume FILE.")
    is_training = not (args.eval or args.predict)
    if args.linear_probe and is_training:
        check_probe(args)
    minmax = args.cutmix_minmax or [0, 1]
    if len(minmax) != 2 or minmax[0] > minmax[1]:
        raise UserError("--cutmix_minmax takes two fractions, the smaller one first.")
    if is_mixing(args) and is_training:
        check_mixing(args)
    warn_ignored(args, parser, ignored_flags(args))


def check_probe(args) -> None:
    """Raises UserError for flags that a linear probe cannot have."""
    if is_mixing(args) or args.drop_path > 0:
        raise UserError("--linear_probe trains a frozen encoder: leave out mixup and drop path.")
    if not (args.finetune or args.resume):
        raise UserError("--linear_probe needs a pre-trained encoder: add --finetune FILE.")
    if args.batch_size == 1:
        raise UserError("--linear_probe uses BatchNorm, which needs a --batch_size of 2 or more.")


def check_mixing(args) -> None:
    """Raises UserError for flags that mixup and cutmix cannot have."""
    if args.batch_size % 2 == 1:
        raise UserError(f"Mixup pairs images: --batch_size {args.batch_size} must be even.")
    if args.class_weights != "none":
        raise UserError("--class_weights weights one label, mixup makes two: leave one out.")


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
    if not args.model_ema:
        ignored["model_ema_decay"] = "no average is kept without --model_ema"
    if not is_mixing(args):
        names = ("mixup_prob", "mixup_switch_prob", "mixup_mode")
        ignored |= dict.fromkeys(names, "nothing is mixed without --mixup or --cutmix")
    if args.linear_probe:
        ignored["layer_decay"] = "--linear_probe trains the head alone"
    if args.eval or args.predict:
        names = "compile recompute mixup cutmix cutmix_minmax layer_decay clip_grad class_weights"
        names = [*names.split(), "best_by", "model_ema_decay", "crop_scale"]
        ignored |= dict.fromkeys(names, "nothing is trained")
    if args.predict:
        names = ("input_size", "patch_size", "in_chans", "mean", "std", "skip_bad_images")
        ignored |= dict.fromkeys(names, "--predict prepares images as the checkpoint says")
    return ignored
