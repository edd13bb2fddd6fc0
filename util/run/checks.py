"""Checks of flags that need no data: ranges, and combinations that cannot act."""

import argparse
import importlib.util
import logging
import os

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from util.io.errors import UserError

IMAGENET_AT_META = "/datasets01/imagenet_full_size/061417/"  # the default of the MAE family
SOURCES = ("data_path", "predict", "knn_data")  # flags that may name a URL

logger = logging.getLogger(__name__)

RANGES = {  # numeric flags of both scripts, in interval notation; the upper ends are generous
    **dict.fromkeys("batch_size accum_iter save_every".split(), "[1, 1000000]"),
    **dict.fromkeys("epochs dist_timeout".split(), "[1, 10000000]"),
    **dict.fromkeys("input_size patch_size".split(), "[1, 32768]"),
    "in_chans": "[1, 4096]",
    "prefetch": "[1, 1000]",
    "num_workers": "[0, 1024]",
    "seed": "[0, 9000000000000000000]",
    **dict.fromkeys("start_epoch skip_nonfinite warmup_epochs replay".split(), "[0, 10000000]"),
    **dict.fromkeys("save_every_minutes keep_every keep_last".split(), "[0, 10000000]"),
    **dict.fromkeys("lr blr min_lr weight_decay".split(), "[0, inf)"),
    "clip_grad": "(0, inf)",
    "mean": "(-inf, inf)",
    "std": "(0, inf)",
    "crop_scale": "(0, 1]",
}


def check_ranges(args: argparse.Namespace, ranges: dict[str, str]) -> None:
    """Compare flags with intervals such as "[0, 1)"; flags that were not given are skipped.

    Raises:
        UserError: a value lies outside its interval, or is not a number.
    """
    for name, interval in ranges.items():
        values = getattr(args, name, None)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None and not is_inside(value, interval):
                raise UserError(f"--{name} is {value}; it must be {in_words(interval)}.")


def is_inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


def in_words(interval: str) -> str:
    """ "[1, inf)" -> "at least 1"; a bounded interval stays as it is written."""
    low, high = interval[1:-1].split(", ")
    if low == "-inf":
        return "a finite number"
    if high != "inf":
        return f"in {interval}"
    return f"at least {low}" if interval[0] == "[" else f"above {low}"


def check_shared(args: argparse.Namespace) -> None:
    """Refuse flags of both scripts that cannot act: UserError with the flag and the remedy."""
    check_ranges(args, RANGES)
    if args.config:
        raise UserError(f"--config {args.config} was not read: parse the flags with parse_flags.")
    check_output(args)
    check_data(args)
    if args.replay and (getattr(args, "eval", False) or getattr(args, "predict", "")):
        raise UserError("--replay takes a training step: leave out --eval and --predict.")
    check_memory(args)


def check_memory(args: argparse.Namespace) -> None:
    """Raises UserError for flags of recomputation and --compile that exclude each other."""
    if args.recompute != "none" and args.grad_checkpointing:
        raise UserError(
            "--grad_checkpointing already recomputes whole blocks: leave out --recompute "
            f"{args.recompute}."
        )
    if args.compile and args.grad_checkpointing:
        raise UserError("--compile plans memory itself: leave out --grad_checkpointing.")
    if args.compile and args.recompute != "none":
        raise UserError(f"--compile plans memory itself: leave out --recompute {args.recompute}.")


def check_output(args: argparse.Namespace) -> None:
    """Raises UserError for flags of saving, resuming and logging that cannot act."""
    if args.keep_last and not args.keep_every:
        raise UserError("--keep_last needs checkpoint-EPOCH.pth files: give --keep_every too.")
    if args.save_every_minutes and not args.output_dir:
        raise UserError("--save_every_minutes has nowhere to save: give --output_dir.")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks in the output folder: give --output_dir.")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs an optional package: pip install wandb")
    if args.wandb and not args.output_dir:
        raise UserError("--wandb keeps its files in the output folder: give --output_dir.")


def check_data(args: argparse.Namespace) -> None:
    """Raises UserError for flags of the data that cannot act."""
    is_default = args.data_path == IMAGENET_AT_META and not getattr(args, "predict", "")
    if is_default and not os.path.exists(IMAGENET_AT_META):
        raise UserError("--data_path is missing: name the folder of the data.")
    if not args.data_path:
        raise UserError("--data_path is empty (an unset variable?); name the folder of the data.")
    if args.crop_scale[0] > args.crop_scale[1]:
        raise UserError("--crop_scale takes two fractions of the area, the smaller one first.")
    if args.shard_cache and not any("://" in getattr(args, name, "") for name in SOURCES):
        raise UserError("--shard_cache is for tar files at a URL: leave it out.")
    if args.skip_bad_images and getattr(args, "eval", False):
        raise UserError("--skip_bad_images is for training (--eval counts all): leave it out.")


def is_mixing(args) -> bool:
    """Whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def set_mean_std(args: argparse.Namespace) -> None:
    """Mean and std of every channel: the flags', ImageNet's for 3 channels, else 0.5.

    Raises:
        UserError: their number does not match --in_chans, or a std is not above 0.
    """
    imagenet = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    defaults = imagenet if args.in_chans == 3 else ([0.5], [0.5])
    for name, default in zip(("mean", "std"), defaults, strict=True):
        values = list(getattr(args, name) or default)
        if len(values) not in (1, args.in_chans):
            raise UserError(
                f"--{name} has {len(values)} values for {args.in_chans} channels; give one for "
                "each channel, or one for all."
            )
        setattr(args, name, values * (args.in_chans if len(values) == 1 else 1))
    check_ranges(args, {"std": RANGES["std"]})


def given_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> set[str]:
    """Names of the flags that were typed; of a bare Namespace, those that differ from defaults."""
    if hasattr(args, "_given"):
        return args._given
    return {name for name, value in vars(args).items() if value != parser.get_default(name)}


def warn_ignored(args: argparse.Namespace, parser, reasons: dict[str, str]) -> None:
    """Warn about flags that were given and have no effect in this run.

    Args:
        reasons: why, by the flag's name.
    """
    for name in sorted(reasons.keys() & given_flags(args, parser)):
        logger.warning("--%s does nothing here: %s", name, reasons[name])


def adopt_input(args, parser, stored: dict, source: str, may_differ: bool = False) -> None:
    """Take channels, sizes, mean and std from a checkpoint's arguments.

    Args:
        stored: its arguments; older files lack some.
        may_differ: a flag that was given wins, with a line in the log.

    Raises:
        UserError: a flag that was given differs from the checkpoint.
    """
    given = given_flags(args, parser)
    for name in ("in_chans", "input_size", "patch_size", "mean", "std"):
        value = stored.get(name)
        if value is None:
            continue
        value = tuple(value) if name == "input_size" and isinstance(value, list) else value
        if name not in given:
            setattr(args, name, value)
        elif is_different(getattr(args, name), value):
            text = f"--{name} is {getattr(args, name)}, {source} was trained with {value}"
            if not may_differ:
                raise UserError(f"{text}; leave the flag out.")
            logger.warning("%s", text)


def is_different(given, stored) -> bool:
    """Whether two values of a flag differ; one value stands for all channels or sides."""
    given, stored = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (given, stored))
    length = max(len(given), len(stored))
    given, stored = (x * length if len(x) == 1 else x for x in (given, stored))
    return given != stored
