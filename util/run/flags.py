"""Flags that both scripts take.

Keep argparse's prefix matching: `--epoch 100` is documented and means --epochs, so no other flag
may begin with --epoch.
"""

import argparse
import difflib
import os
import re
import sys
from functools import partial

from util.run.checks import IMAGENET_AT_META
from util.run.config import expand_config

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


def add_flag(group, name: str, kind, default, help: str, **options) -> None:
    """Add one flag; the help ends with its default.

    Args:
        group: a parser or an argument group.
        kind: type of the value; bool for a switch, which is off by default.
        default: None where each script, or the model, sets it.
        options: further arguments of argparse.
    """
    if kind is bool:
        group.add_argument(name, help=help, **{"action": "store_true", **options})
        return
    if default not in (None, "") and "default" not in help and help != argparse.SUPPRESS:
        help += " (default: %(default)s)"
    group.add_argument(name, type=kind, default=default, help=help, **options)


def shared_parser() -> argparse.ArgumentParser:
    """Parser for `parents=[...]`; each script sets its own defaults."""
    parser = FlagParser(add_help=False)
    add_model_flags(partial(add_flag, parser.add_argument_group("model")))
    add_optim_flags(partial(add_flag, parser.add_argument_group("optimization")))
    add_data_flags(partial(add_flag, parser.add_argument_group("data")))
    add_run_flags(partial(add_flag, parser.add_argument_group("run")))
    add_launch_flags(partial(add_flag, parser.add_argument_group("distributed")))
    parser.set_defaults(pin_mem=True)
    return parser


def add_model_flags(flag) -> None:
    text = "side of the input crop, or its height and width"
    flag("--input_size", int, 224, text, nargs="+", action=SizeAction, metavar="PIXELS")
    flag("--patch_size", int, None, "patch side in pixels (default: the model's)")
    flag("--in_chans", int, 3, "image channels")
    text = "use the flash-attn package if it can run here, else prefer PyTorch's own kernel"
    flag("--enable_flash_attention2", bool, False, text)
    text = "keep only block inputs and run every block again in backward: less memory, slower"
    flag("--grad_checkpointing", bool, False, text)
    text = (
        "compute again in backward instead of storing: gelu (and CrossMAE's stack of maps), "
        "less memory for more memory traffic; all, LayerNorm too"
    )
    flag("--recompute", str, "none", text, choices=["none", "gelu", "all"])
    text = (
        "torch.compile every transformer block (blocks, the default of a bare --compile) or all of "
        "the model (whole); the first step then takes minutes"
    )
    options = dict(nargs="?", const="blocks", choices=["blocks", "whole"])
    flag("--compile", str, None, text, **options)


def add_optim_flags(flag) -> None:
    text = "images per rank and forward pass; effective batch size = this x accum_iter x world size"
    flag("--batch_size", int, 64, text)
    flag("--accum_iter", int, 1, "forward passes per optimizer step")
    flag("--weight_decay", float, 0.05, "of AdamW")
    flag("--clip_grad", float, None, "largest gradient norm (default: no limit)")
    flag("--lr", float, None, "peak learning rate, instead of --blr and its scaling")
    flag("--blr", float, 1e-3, "peak learning rate per 256 images")
    flag("--min_lr", float, None, "learning rate at the end (default: %(default)s)")
    flag("--warmup_epochs", int, None, "linear warm-up from 0 (default: %(default)s epochs)")
    text = "autocast dtype; auto: bf16 where the GPU supports it, else fp16; off on a CPU"
    flag("--amp", str, "auto", text, choices=["auto", "bf16", "fp16", "off"])
    text = "steps per epoch that may be skipped because loss or gradients are not finite"
    flag("--skip_nonfinite", int, 0, text, metavar="N")


def add_data_flags(flag) -> None:
    text = (
        "folder with train/ and val/, each with one folder per class; pre-training takes any "
        "folder of images, a text file that lists them, or tar files (NAME-{0000..0003}.tar or "
        "their folder; also at a URL: hf://datasets/..., s3://, gs://, https://)"
    )
    flag("--data_path", str, IMAGENET_AT_META, text)
    text = "folder of this machine to which tar files at a URL are copied, once"
    flag("--shard_cache", str, None, text, metavar="DIR")
    text = "in training, replace an unreadable image by the next one and count it"
    flag("--skip_bad_images", bool, False, text)
    text = "of images in 0..1 (default: ImageNet's; 0.5 unless 3 channels)"
    flag("--mean", float, None, f"channel means {text}", nargs="+", metavar="M")
    flag("--std", float, None, f"channel stds {text}", nargs="+", metavar="S")
    text = "smallest and largest fraction of an image's area that a training crop takes (default: "
    text += "0.2 1 in pre-training, 0.08 1 in fine-tuning)"
    flag("--crop_scale", float, None, text, nargs=2, metavar=("MIN", "MAX"))
    text = "DataLoader workers per rank (default: 10, at most one per core)"
    flag("--num_workers", int, min(10, os.cpu_count() or 1), text)
    flag("--prefetch", int, 2, "batches prefetched per worker")
    flag("--pin_mem", bool, False, "pinned host memory (the default)")
    flag("--no_pin_mem", bool, False, "pageable memory", action="store_false", dest="pin_mem")
    text = "no effect: workers are always persistent; kept for older commands"
    flag("--multi_epochs_dataloader", bool, False, text)


def add_run_flags(flag) -> None:
    text = (
        "YAML or JSON file with flags by name, or run.json of an earlier run; flags of the command "
        "line win"
    )
    flag("--config", str, "", text, metavar="FILE")
    flag("--epochs", int, None, "length of the run (default: %(default)s)")
    text = "checkpoints, log.txt and TensorBoard files; '' writes nothing"
    flag("--output_dir", str, "./output_dir", text)
    flag("--log_dir", str, None, "TensorBoard folder (default: output_dir)")
    text = "also log to this project of Weights & Biases (pip install wandb)"
    flag("--wandb", str, "", text, metavar="PROJECT")
    flag("--device", str, None, "cuda or cpu (default: cuda if available)")
    flag("--seed", int, 0, "the rank is added")
    text = "checkpoint to resume from: a file, an https:// or hf:// URL, or `auto` for the newest "
    flag("--resume", str, "", text + "complete one in the output folder")
    text = (
        "take this step of an earlier run once more, from the newest checkpoint of the output "
        "folder or --resume, and name the first module that is not finite; writes nothing"
    )
    flag("--replay", int, None, text, nargs=2, metavar=("EPOCH", "ITERATION"))
    flag("--save_every", int, 1, "epochs between checkpoint.pth")
    text = "also save inside an epoch, this often (default: 0, only at its end)"
    flag("--save_every_minutes", float, 0, text)
    text = (
        "epochs between checkpoint-EPOCH.pth files, which are kept; 0: none (default: %(default)s)"
    )
    flag("--keep_every", int, None, text)
    flag("--keep_last", int, 0, "keep only the last N checkpoint-EPOCH.pth; 0: all")
    flag("--start_epoch", int, 0, "first epoch")


def add_launch_flags(flag) -> None:
    flag("--world_size", int, 1, "no effect: the launcher sets the world size")
    flag("--local_rank", int, -1, "no effect: kept for older launchers")
    flag("--local-rank", int, -1, argparse.SUPPRESS)
    flag("--dist_on_itp", bool, False, "read ranks from Open MPI's variables")
    flag("--dist_url", str, "env://", "rendezvous URL")
    flag("--dist_timeout", int, 1800, "seconds before a collective times out")


def parse_flags(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, modes: dict | None = None
) -> argparse.Namespace:
    """Arguments of a command line and its --config; `given_flags` then knows which were given.

    Args:
        modes: {switch: defaults that it changes}.
    """
    words = expand_config(parser, sys.argv[1:] if argv is None else list(argv))
    # argparse leaves attributes that a namespace has already: only typed flags replace UNSET.
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(words)), UNSET))
    given = {k: v for k, v in vars(parser.parse_args(words, unset)).items() if v is not UNSET}
    for switch, defaults in (modes or {}).items():
        if given.get(switch):
            parser.set_defaults(**defaults)
    args = parser.parse_args(words)  # again, with the defaults of the modes
    args._given = given.keys()
    args._words = words
    return args


class SizeAction(argparse.Action):
    """One value stays a number (a square); two become (height, width)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            parser.error(f"{option_string} takes a side, or a height and a width: got {values}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))
