"""Checkpoint files: the one safe read, the one safe write, and the type of a file.

A file is a dict of tensors and plain values under the names the MAE family uses (model, optimizer,
epoch, scaler, args), so other tools find `model` where they expect it. Reading never runs code from
the file.
"""

import argparse
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from util.io.checkpoint_content import check_content
from util.io.download import fetch
from util.io.errors import CheckpointError, one_line
from util.io.files import atomic_write

logger = logging.getLogger(__name__)

PLAIN = (str, int, float, bool, type(None))  # besides lists and tuples of them
PREFIXES = ("module.", "_orig_mod.")  # of DDP and compile


def read_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint from a file or an https:// or hf:// URL, without running code from it.

    Accepts tensors, containers, numbers and strings, and argparse.Namespace with such values (older
    files keep their arguments in one; it is returned as a dict). safetensors files are read as
    weights.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or holds anything else.
    """
    path = Path(fetch(str(source)))
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder; name a checkpoint in it, as checkpoint.pth.")
    if not os.path.exists(path):
        raise CheckpointError(f"There is no checkpoint file {path}; check the path.")
    size = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            checkpoint = read_safetensors(path)
        else:
            checkpoint = read_torch(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(explain_refusal(path, size, error)) from error
    except Exception as error:  # a damaged file fails in many ways, each named by its own library
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a complete checkpoint ({one_line(error)}); "
            "copy or download it again."
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; a dict with the entry "
            "'model' or a state dict is needed."
        )
    if "args" in checkpoint:
        checkpoint = {**checkpoint, "args": read_args(path, checkpoint["args"])}
    check_content(checkpoint, path)
    return checkpoint


def read_torch(path: Path):
    """Content of a file that torch.save wrote; raises whatever the libraries raise."""
    if zipfile.is_zipfile(path):
        check_zip(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_position(path: Path) -> tuple[int, int]:
    """(epoch, iteration) at which a checkpoint file resumes, without reading its tensors.

    (-1, 0) if the file does not tell, or cannot be read; read_checkpoint says why.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            mmap = zipfile.is_zipfile(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return int(checkpoint["epoch"]) + 1, int(checkpoint.get("state", {}).get("iteration", 0))
    except Exception:  # damaged in one of many ways
        return -1, 0


def read_safetensors(path: Path) -> dict:
    """Weights of a safetensors file, with arguments and class names if tools.export wrote it."""
    with safe_open(path, framework="pt") as file:
        checkpoint = {"model": {name: file.get_tensor(name) for name in file.keys()}}
        metadata = file.metadata() or {}
    for entry in ("args", "class_names"):
        if entry in metadata:
            checkpoint[entry] = json.loads(metadata[entry])
    return checkpoint


def check_zip(path: Path) -> None:
    """Verify the checksum of every member, which torch.load does not.

    Raises:
        CheckpointError: a member is damaged, or compressed, as torch never writes them.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path} is not a checkpoint file: {member.filename} in it is compressed; "
                    "use the file as torch.save wrote it."
                )
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: the checksum of {damaged} is wrong; use another copy of it."
        )


def explain_refusal(path: Path, size: int, error: Exception) -> str:
    """Message for a file that torch refuses to load."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} ({size:,} bytes) is a web page, not a checkpoint; download the file itself."
    if not zipfile.is_zipfile(path) and not start.startswith((b"\x80", b"pk")):
        return f"{path} ({size:,} bytes) is not a checkpoint file; check what it is."
    try:
        names = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # only old or damaged files: the sentence below still says enough
        names = ""
    return (
        f"{path} is refused: it would run code ({names or one_line(error)}), which "
        "weights never need; get it from a source you trust and save its weights alone."
    )


def read_args(path: Path, args) -> dict:
    """Arguments of a run as a dict of plain values; others are skipped with a warning."""
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        logger.warning("%s: its args are a %s; skipped", path, type(args).__name__)
        return {}
    plain = {}
    for name, value in args.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(name, str) and all(type(v) in PLAIN for v in values):
            plain[name] = value
        else:
            logger.warning("%s: argument %s is a %s; skipped", path, name, type(value).__name__)
    return plain


def weights_of(checkpoint: dict, source: str = "the checkpoint") -> dict[str, Tensor]:
    """The state dict of a checkpoint, without the prefixes of DDP and compile.

    Raises:
        CheckpointError: it has no weights, or they are not floats.
    """
    weights = checkpoint.get("model", checkpoint)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        found = ", ".join(map(str, list(checkpoint)[:8]))
        raise CheckpointError(
            f"{source} holds no weights (entries: {found}); an entry 'model' with a state dict, "
            "or a bare state dict, is needed."
        )
    for name, value in weights.items():
        if not value.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise CheckpointError(f"{name} of {source} holds {value.dtype}; floats are needed.")
    return {strip_prefixes(name): value for name, value in weights.items()}


def strip_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def checkpoint_type(weights: dict[str, Tensor]) -> str:
    """ "pre-training", "fine-tuned", "encoder" or "unknown", by the names of the weights."""
    if "mask_token" in weights:
        return "pre-training"
    if "head.weight" in weights or "head.1.weight" in weights:
        return "fine-tuned"
    return "encoder" if "patch_embed.proj.weight" in weights else "unknown"


def plain_args(args: argparse.Namespace) -> dict:
    """Arguments as plain values and lists of them; of anything else its text."""
    return {
        name: value if isinstance(value, (*PLAIN, list, tuple)) else str(value)
        for name, value in vars(args).items()
        if not name.startswith("_")
    }


def write_checkpoint(checkpoint: dict, path: Path, links: Sequence[Path] = ()) -> None:
    """Write a checkpoint that is complete or absent and never harms the previous one.

    Args:
        links: further names of the same file.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with atomic_write(path, links, parents=False) as tmp_path:
        try:
            torch.save(checkpoint, tmp_path)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(one_line(error)) from error
