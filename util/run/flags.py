"""Flags that both scripts take.

Keep argparse's prefix matching: `--epoch 100` is documented and means --epochs, so no other flag
may begin with --epoch.
"""

import argparse
import difflib
import os
import re

from util.run.checks import IMAGENET_AT_META

UNSET = object()
NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|^-inf$", re.IGNORECASE)


class FlagParser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors that name the closest flag."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own does not know -1e-3

    def error(self, message: str):
        """Exit with status 2; the usage, which fills a screen, is left to --help."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        typed = message.removeprefix("unrecognized arguments: ").split("=")[0].split()
        close = difflib.get_close_matches(typed[0], flags, n=1) if typed else []
        hint = f"; did you mean {close[0]}?" if close and close[0] != typed[0] else "; see --help"
        self.exit(2, f"{self.prog}: {message}{hint}\n")


def shared_parser() -> argparse.ArgumentParser:
    """Parser for `parents=[...]`; each script sets its own defaults."""
    parser = FlagParser(add_help=False)
    add_model_flags(parser.add_argument_group("model"))
    add_optim_flags(parser.add_argument_group("optimization"))
    add_data_flags(parser.add_argument_group("data"))
    add_run_flags(parser.add_argument_group("run"))
    add_launch_flags(parser.add_argument_group("distributed"))
    parser.set_defaults(pin_mem=True)
    return parser


def add_model_flags(group) -> None:
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
    group.add_argument("--in_chans", type=int, default=3, help="image channels (default: 3)")
    group.add_argument(
        "--enable_flash_attention2",
        action="store_true",
        help="use the flash-attn package if it can run here, else prefer PyTorch's own "
        "FlashAttention-2 kernel",
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


def add_optim_flags(group) -> None:
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="images per rank and forward pass; effective batch size = batch_size x accum_iter x "
        "world size (default: 64)",
    )
    group.add_argument(
        "--accum_iter", type=int, default=1, help="forward passes per optimizer step (default: 1)"
    )
    group.add_argument("--weight_decay", type=float, default=0.05, help="of AdamW (default: 0.05)")
    group.add_argument("--clip_grad", type=float, help="largest gradient norm (default: no limit)")
    group.add_argument(
        "--lr", type=float, help="peak learning rate, instead of --blr and its scaling"
    )
    group.add_argument(
        "--blr", type=float, default=1e-3, help="peak learning rate per 256 images (default: 1e-3)"
    )
    group.add_argument(
        "--min_lr", type=float, help="learning rate at the end (default: %(default)s)"
    )
    group.add_argument(
        "--warmup_epochs", type=int, help="linear warm-up from 0 (default: %(default)s epochs)"
    )
    group.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="autocast dtype; auto: bf16 where the GPU supports it, else fp16; off on a CPU "
        "(default: auto)",
    )
    group.add_argument(
        "--skip_nonfinite",
        type=int,
        default=0,
        metavar="N",
        help="steps per epoch that may be skipped because loss or gradients are not finite "
        "(default: 0, stop at the first)",
    )


def add_data_flags(group) -> None:
    group.add_argument(
        "--data_path",
        default=IMAGENET_AT_META,
        help="folder with train/ and val/, each with one folder per class; pre-training takes any "
        "folder of images, a text file that lists them, or tar files (NAME-{0000..0003}.tar or "
        "their folder)",
    )
    group.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="in training, replace an unreadable image by the next one and count it (default: "
        "stop and name it)",
    )
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="M",
        help="channel means of images in 0..1 (default: ImageNet's; 0.5 unless 3 channels)",
    )
    group.add_argument(
        "--std",
        type=float,
        nargs="+",
        metavar="S",
        help="channel stds of images in 0..1 (default: ImageNet's; 0.5 unless 3 channels)",
    )
    group.add_argument(
        "--num_workers",
        type=int,
        default=min(10, os.cpu_count() or 1),
        help="DataLoader workers per rank (default: 10, at most one per core)",
    )
    group.add_argument(
        "--prefetch", type=int, default=2, help="batches prefetched per worker (default: 2)"
    )
    group.add_argument("--pin_mem", action="store_true", help="pinned host memory (the default)")
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="pageable memory")
    group.add_argument(
        "--multi_epochs_dataloader",
        action="store_true",
        help="no effect: workers are always persistent; kept for older commands",
    )


def add_run_flags(group) -> None:
    group.add_argument("--epochs", type=int, help="length of the run (default: %(default)s)")
    group.add_argument(
        "--output_dir",
        default="./output_dir",
        help="checkpoints, log.txt and TensorBoard files; '' writes nothing "
        "(default: ./output_dir)",
    )
    group.add_argument("--log_dir", help="TensorBoard folder (default: output_dir)")
    group.add_argument("--device", help="cuda or cpu (default: cuda if available)")
    group.add_argument("--seed", type=int, default=0, help="the rank is added (default: 0)")
    group.add_argument(
        "--resume",
        default="",
        help="checkpoint to resume from: a file, an https:// or hf:// URL, or `auto` for the "
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
        help="epochs between checkpoint-EPOCH.pth files, which are kept; 0: none (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--keep_last",
        type=int,
        default=0,
        help="keep only the last N checkpoint-EPOCH.pth; 0: all (default: 0)",
    )
    group.add_argument("--start_epoch", type=int, default=0, help="first epoch (default: 0)")


def add_launch_flags(group) -> None:
    group.add_argument(
        "--world_size", type=int, default=1, help="no effect: the launcher sets the world size"
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
    group.add_argument("--dist_url", default="env://", help="rendezvous URL (default: env://)")
    group.add_argument(
        "--dist_timeout",
        type=int,
        default=1800,
        help="seconds before a collective times out (default: 1800)",
    )


def parse_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """Arguments of a command line; `given_flags` then knows which of them were typed."""
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args), UNSET))
    typed = vars(parser.parse_args(argv, unset)).items()
    args._given = {name for name, value in typed if value is not UNSET}
    return args


class SizeAction(argparse.Action):
    """One value stays a number (a square); two become (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes a side, or a height and a width: got {values}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))
