"""The startup summary in the log, and run.json, which keeps it."""

import datetime
import json
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from timm.layers import to_2tuple

from util.io.checkpoint_file import plain_args
from util.io.files import atomic_write

logger = logging.getLogger(__name__)


def startup_summary(
    args, model, lr_text: str, attention_text: str, amp_dtype: torch.dtype | None, data_text: str
) -> dict[str, str]:
    """What a researcher checks before leaving a run alone, as {name: text}."""
    num_params = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    height, width = to_2tuple(args.input_size)
    patch_embed = model.patch_embed
    precision = f"{str(amp_dtype).removeprefix('torch.')} autocast" if amp_dtype else "float32"
    device = str(args.device)
    if args.device.type == "cuda":
        precision += ", TF32 for the rest"
        device += f" ({torch.cuda.get_device_name(args.device)})"
    else:
        device += f" ({torch.get_num_threads()} threads)"
    return {
        "model": f"{args.model}, {num_trainable / 1e6:.2f} M trainable of {num_params / 1e6:.2f} M "
        "parameters",
        "input": f"{args.in_chans} x {height} x {width}, patch {patch_embed.patch_size}, "
        f"{patch_embed.num_patches} patches",
        "effective batch": f"{args.batch_size} × {args.accum_iter} accum × {args.world_size} "
        f"rank{'s' if args.world_size > 1 else ''} = {effective_batch_size(args)}",
        "learning rate": lr_text,
        "precision": precision,
        "device": device + (f", {args.dist_backend}" if args.dist_backend else ""),
        "attention": attention_text,
        "data": data_text,
        "output": args.output_dir or "(nothing is written)",
    }


def effective_batch_size(args) -> int:
    """Images per optimizer step, over all ranks."""
    return args.batch_size * args.accum_iter * args.world_size


def log_summary(args, summary: dict[str, str]) -> None:
    """Log the summary, then the learning-rate lines that users of the MAE family search for."""
    for name, text in summary.items():
        if name != "effective batch":  # its product is in the lines below
            logger.info("%-16s %s", name, text)
    effective = effective_batch_size(args)
    logger.info("base lr: %.2e", args.lr * 256 / effective)
    logger.info("actual lr: %.2e", args.lr)
    logger.info("accumulate grad iterations: %d", args.accum_iter)
    logger.info("effective batch size: %d", effective)
    if args.epochs <= args.warmup_epochs:
        logger.warning(
            "--warmup_epochs %d is not shorter than --epochs %d: lr never reaches its peak",
            *(args.warmup_epochs, args.epochs),
        )


def write_run_json(args, summary: dict[str, str]) -> None:
    """run.json in the output folder of rank 0: command, arguments, versions, summary."""
    if args.rank or not args.output_dir:
        return
    content = {
        # with the flags of --config, so that it can be one itself
        "command": [sys.argv[0], *getattr(args, "_words", sys.argv[1:])],
        "args": plain_args(args),
        "effective_batch": effective_batch_size(args),
        "start": summary,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "python": sys.version.split()[0],
        "commit": read_commit(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with atomic_write(Path(args.output_dir, "run.json")) as tmp_path:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        tmp_path.write_text(text + "\n", encoding="utf-8")


def read_commit() -> str | None:
    """Commit of this code, with -dirty if it was changed; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
