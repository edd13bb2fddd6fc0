"""Flags that both scripts take, and checks that need no data.

Keep argparse's prefix matching: `--epoch 100` is documented and means --epochs, so no other flag
may begin with --epoch.
"""

import argparse
import os
import platform
from pathlib import Path

from timm.layers import to_2tuple

from util.io.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
AT_LEAST_ONE = (
    "batch_size accum_iter epochs in_chans patch_size prefetch save_every dist_timeout".split()
)
NOT_NEGATIVE = (
    "num_workers start_epoch skip_nonfinite save_every_minutes keep_every keep_last "
    "weight_decay warmup_epochs lr blr min_lr seed log_images".split()
)


def shared_parser() -> argparse.ArgumentParser:
    """Parser to be used in `parents=[...]`; defaults are set by each script."""
    parser = argparse.ArgumentParser(add_help=False)
    for add_flags in (
        add_model_flags,
        add_optim_flags,
        add_data_flags,
        add_run_flags,
        add_launch_flags,
    ):
        add_flags(parser)
    parser.set_defaults(pin_mem=True)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--input_size",
        type=int,
        nargs="+",
        default=224,
        action=SizeAction,
        metavar="PIXELS",
        help="side of the input crop, or its height and width (default: 224)",
    )
    group.add_argument("--patch_size", type=int, help="patch side in pixels (default: the model's)")
    group.add_argument("--in_chans", type=int, default=3, help="channels of a picture (default: 3)")
    group.add_argument(
        "--enable_flash_attention2",
        action="store_true",
        help=(
            "use the flash-attn package if it can run here, else PyTorch's own FlashAttention-2 "
            "kernel"
        ),
    )
    group.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="keep only block inputs and run every block again in backward: less memory, slower",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile every transformer block; the first step then takes minutes",
    )


def add_optim_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="images per process and forward pass; effective batch = this x accum_iter x processes "
        "(default: 64)",
    )
    group.add_argument(
        "--accum_iter", type=int, default=1, help="forward passes per update (default: 1)"
    )
    group.add_argument("--weight_decay", type=float, default=0.05, help="of AdamW (default: 0.05)")
    group.add_argument("--clip_grad", type=float, help="largest gradient norm (default: no limit)")
    group.add_argument(
        "--lr", type=float, help="peak learning rate, instead of --blr and its scaling"
    )
    group.add_argument(
        "--blr", type=float, default=1e-3, help="peak learning rate per 256 images (default: 1e-3)"
    )
    group.add_argument("--min_lr", type=float, help="where the cosine ends (default: %(default)s)")
    group.add_argument(
        "--warmup_epochs", type=int, help="linear rise from 0 (default: %(default)s epochs)"
    )
    group.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help=(
            "autocast type; auto: bf16 where the GPU has it, else fp16; off on a CPU (default: "
            "auto)"
        ),
    )
    group.add_argument(
        "--skip_nonfinite",
        type=int,
        default=0,
        metavar="N",
        help="steps per epoch that may be skipped because loss or gradients are not finite "
        "(default: 0, stop at the first)",
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="/datasets01/imagenet_full_size/061417/",
        help="folder with train/ and val/, each with one folder per class; pre-training takes any "
        "folder of pictures, a text file that lists them, or tar files (NAME-{0000..0003}.tar or "
        "their folder)",
    )
    group.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="in training, put the next picture in place of one that cannot be read, and count "
        "them (default: stop and name it)",
    )
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="M",
        help="channel means of pictures in 0..1 (default: ImageNet's; 0.5 unless 3 channels)",
    )
    group.add_argument(
        "--std",
        type=float,
        nargs="+",
        metavar="S",
        help="channel deviations (default: ImageNet's; 0.5 unless 3 channels)",
    )
    group.add_argument(
        "--num_workers", type=int, default=10, help="loader processes per process (default: 10)"
    )
    group.add_argument(
        "--prefetch",
        type=int,
        default=2,
        help="batches that each loader process holds ready (default: 2)",
    )
    group.add_argument("--pin_mem", action="store_true", help="pinned host memory (the default)")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="pageable memory")
    group.add_argument(
        "--multi_epochs_dataloader",
        action="store_true",
        help="no effect: loader processes always live on between epochs; kept for older commands",
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", type=int, help="length of the run (default: %(default)s)")
    group.add_argument(
        "--output_dir",
        default="./output_dir",
        help=(
            "checkpoints, log.txt and TensorBoard files; '' writes nothing (default: ./output_dir)"
        ),
    )
    group.add_argument("--log_dir", help="TensorBoard folder (default: output_dir)")
    group.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    group.add_argument("--seed", type=int, default=0, help="rank is added to it (default: 0)")
    group.add_argument(
        "--resume",
        default="",
        help="checkpoint to go on from: a file, an https or hf:// address, or `auto` for the "
        "newest complete one in the output folder",
    )
    group.add_argument(
        "--save_every", type=int, default=1, help="epochs between checkpoint.pth (default: 1)"
    )
    group.add_argument(
        "--save_every_minutes",
        type=float,
        default=0,
        help="also save inside an epoch, this often (default: 0, only at its end)",
    )
    group.add_argument(
        "--keep_every",
        type=int,
        help="epochs between checkpoint-EPOCH.pth files that stay; 0: none (default: %(default)s)",
    )
    group.add_argument(
        "--keep_last",
        type=int,
        default=0,
        help="how many checkpoint-EPOCH.pth files stay; 0: all (default: 0)",
    )
    group.add_argument(
        "--start_epoch", type=int, default=0, help="number of the first epoch (default: 0)"
    )


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distributed")
    group.add_argument(
        "--world_size", type=int, default=1, help="no effect: the launcher says how many there are"
    )
    group.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=-1,
        help="no effect: kept for older launchers",
    )
    group.add_argument(
        "--dist_on_itp", action="store_true", help="read ranks from Open MPI's variables"
    )
    group.add_argument(
        "--dist_url", default="env://", help="where processes meet (default: env://)"
    )
    group.add_argument(
        "--dist_timeout",
        type=int,
        default=1800,
        help="seconds a process waits for another (default: 1800)",
    )


class SizeAction(argparse.Action):
    """One number stays a number (a square); two become (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes a side, or a height and a width: got {values}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


def check_shared(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags, and refuse what cannot work.

    Raises:
        UserError: with the flag, its value and the remedy.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in AT_LEAST_ONE:
        if given.get(name, 1) < 1:
            raise UserError(f"--{name} is {given[name]}; it must be at least 1.")
    for name in NOT_NEGATIVE:
        if not given.get(name, 0) >= 0:  # nan neither
            raise UserError(f"--{name} is {given[name]}; it must not be negative.")
    if not given.get("clip_grad", 1) > 0:
        raise UserError(f"--clip_grad is {args.clip_grad}: no step at all; leave it out instead.")
    if args.keep_last and not args.keep_every:
        raise UserError("--keep_last needs checkpoint-EPOCH.pth files: give --keep_every too.")
    if args.save_every_minutes and not args.output_dir:
        raise UserError("--save_every_minutes has nowhere to save: give --output_dir.")
    if min(to_2tuple(args.input_size)) < 1:
        raise UserError(f"--input_size is {args.input_size}; it must be at least 1.")
    if not args.data_path:
        raise UserError("--data_path is empty (an unset variable?); name the data's folder.")
    if args.compile and args.grad_checkpointing:
        raise UserError("--compile plans memory itself: leave out --grad_checkpointing.")
    if args.skip_bad_images and getattr(args, "eval", False):
        raise UserError("--skip_bad_images is for training, --eval counts every image: drop it.")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks in the output folder: give --output_dir.")
    set_mean_std(args)


def set_mean_std(args: argparse.Namespace) -> None:
    """Mean and deviation of every channel: the flags', ImageNet's for 3 channels, else 0.5.

    Raises:
        UserError: their number does not fit, or a deviation is not above 0.
    """
    default_mean, default_std = (
        (IMAGENET_MEAN, IMAGENET_STD) if args.in_chans == 3 else ((0.5,),) * 2
    )
    args.mean = spread(args.mean or default_mean, args.in_chans, "--mean")
    args.std = spread(args.std or default_std, args.in_chans, "--std")
    if min(args.std) <= 0:
        raise UserError(f"--std holds {min(args.std)}; deviations must be above 0.")


def spread(values, in_chans: int, flag: str) -> list[float]:
    """One value per channel; a single value stands for all.

    Raises:
        UserError: there are neither one nor in_chans values.
    """
    if len(values) not in (1, in_chans):
        raise UserError(
            f"{flag} has {len(values)} values for {in_chans} channels; give one for each."
        )
    return list(values) * (in_chans if len(values) == 1 else 1)


def prepare_output(args: argparse.Namespace) -> None:
    """Make the output folder, if there is to be one; log_dir follows it.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    if args.log_dir is None:
        args.log_dir = args.output_dir
    for flag in ("output_dir", "log_dir"):
        if getattr(args, flag):
            make_writable(getattr(args, flag), flag)


def make_writable(folder: str, flag: str) -> None:
    """Make a folder and try to write in it.

    Raises:
        UserError: that does not work; names the flag.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # processes of several hosts may do this at once, in containers even with one number
        probe = Path(folder, f".writable.{platform.node()}.{os.getpid()}")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot write to the output folder {folder} ({error.strerror}); "
            f"choose another --{flag}."
        ) from error
