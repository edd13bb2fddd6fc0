"""The block a researcher checks before going away, and run.json, which keeps it."""

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
from util.optim import choose_amp_dtype

logger = logging.getLogger(__name__)


def log_startup_summary(args, model, lr_text: str, attention: str, data_text: str) -> None:
    """The block a researcher checks before going away."""
    num_params = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    effective = args.batch_size * args.accum_iter * args.world_size
    size = to_2tuple(args.input_size)
    amp_dtype = choose_amp_dtype(args.amp, args.device)
    precision = f"{str(amp_dtype).removeprefix('torch.')} autocast" if amp_dtype else "float32"
    where = str(args.device)
    if args.device.type == "cuda":
        precision += ", TF32 for the rest"
        where += f" ({torch.cuda.get_device_name(args.device)})"
    else:
        where += f" ({torch.get_num_threads()} threads)"
    lines = {
        "model": f"{args.model}, {num_trainable / 1e6:.2f} M trainable of {num_params / 1e6:.2f} M "
        "parameters",
        "input": f"{args.in_chans} x {size[0]} x {size[1]}, patch {model.patch_embed.patch_size}, "
        f"{model.patch_embed.num_patches} patches",
        "effective batch": f"{args.batch_size} × {args.accum_iter} accum × {args.world_size} "
        f"process{'es' if args.world_size > 1 else ''} = {effective}",
        "learning rate": lr_text,
        "precision": precision,
        "device": where + (f", {args.dist_backend}" if args.dist_backend else ""),
        "attention": attention,
        "data": data_text,
        "output": args.output_dir or "(nothing is written)",
    }
    for name, text in lines.items():
        logger.info("%-16s %s", name, text)
    if args.rank == 0 and args.output_dir:
        write_run_json(args, effective, lines)
    logger.info("base lr: %.2e", args.lr * 256 / effective)
    logger.info("actual lr: %.2e", args.lr)
    logger.info("accumulate grad iterations: %d", args.accum_iter)
    logger.info("effective batch size: %d", effective)
    if args.epochs <= args.warmup_epochs:
        logger.warning(
            "--warmup_epochs %d is not shorter than --epochs %d: lr never reaches its peak",
            *(args.warmup_epochs, args.epochs),
        )


def write_run_json(args, effective_batch: int, start_block: dict[str, str]) -> None:
    """run.json in the output folder: what was run, with what, on what."""
    manifest = {
        "command": sys.argv,
        "args": plain_args(args),
        "effective_batch": effective_batch,
        "start": start_block,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "python": sys.version.split()[0],
        "commit": read_commit(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    with atomic_write(Path(args.output_dir, "run.json")) as tmp_path:
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
