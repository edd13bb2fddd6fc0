"""What a run saves, and the ways to load it: to resume, to fine-tune, to start another run.

The files are read and written by util/io/checkpoint_file.py.
"""

import logging
from pathlib import Path

from timm.layers import to_2tuple
from torch import Tensor, nn

from util.io.checkpoint_file import (
    checkpoint_type,
    plain_args,
    read_checkpoint,
    strip_prefixes,
    weights_of,
    write_checkpoint,
)
from util.io.errors import CheckpointError
from util.optim import load_optimizer
from util.pos_embed import interpolate_pos_embed

logger = logging.getLogger(__name__)

MODEL_FLAGS = (  # decide the names and shapes of the weights
    "model input_size patch_size in_chans cross_mae decoder_depth decoder_embed_dim weight_fm "
    "use_fm use_input self_attn nb_classes global_pool linear_probe".split()
)
ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.")


def load_encoder(model: nn.Module, weights: dict[str, Tensor], old_grid=None):
    """Load a pre-trained encoder into a classifier: all of it, or nothing.

    The position embedding is resized where the grids differ. Decoder weights and a head of another
    size are left out. `norm` may be missing (a CrossMAE file has none) and keeps its
    initialization.

    Args:
        old_grid: (rows, columns) of the stored position embedding; by default a square.

    Returns:
        torch's (missing_keys, unexpected_keys).

    Raises:
        CheckpointError: a tensor of the encoder is missing or has another shape.
    """
    weights = dict(weights)
    own = model.state_dict()
    for name in ("head.weight", "head.bias"):
        if name in weights and weights[name].shape != own[name].shape:
            logger.info("Removing key %s from pretrained checkpoint", name)
            del weights[name]
    check_encoder(own, weights, skip=("pos_embed",))
    interpolate_pos_embed(model, weights, old_grid)
    check_encoder(own, weights)
    result = model.load_state_dict(weights, strict=False)
    count = sum(name.startswith(ENCODER_PARTS) for name in own)
    new = ", ".join(result.missing_keys) or "nothing"
    logger.info("Matched %d of %d encoder tensors; newly initialized: %s", count, count, new)
    return result


def load_pretrained(model: nn.Module, checkpoint: dict, source: str) -> None:
    """--finetune: load the encoder of a checkpoint, without its head.

    Args:
        source: the file's name, for the log.

    Raises:
        CheckpointError: the encoder is not that of the model.
    """
    logger.info("Load pre-trained checkpoint from: %s", source)
    check_architecture(model, checkpoint, source)
    weights = weights_of(checkpoint, source)
    for name in [name for name in weights if name.startswith("head.")]:
        logger.info("Removing key %s from pretrained checkpoint", name)
        del weights[name]
    check_encoder(model.state_dict(), weights, skip=("pos_embed",))
    load_encoder(model, weights, stored_grid(checkpoint, weights, model.patch_embed.patch_size))


def stored_grid(checkpoint: dict, weights: dict, patch_size: int) -> tuple[int, int] | None:
    """(rows, columns) of a checkpoint's position embedding by its input size; None: a square."""
    height, width = to_2tuple(checkpoint.get("args", {}).get("input_size") or 0)
    grid = (height // patch_size, width // patch_size)
    pos_embed = weights.get("pos_embed")
    # The public MAE baseline stored --input_size without using it: its grid is a square.
    if pos_embed is not None and grid[0] * grid[1] != pos_embed.shape[1] - 1:
        return None
    return grid if all(grid) else None


def check_encoder(own: dict[str, Tensor], weights: dict[str, Tensor], skip=()) -> None:
    """Raises CheckpointError unless every encoder tensor is present in the right shape."""
    for name, value in own.items():
        if not name.startswith(ENCODER_PARTS):
            continue
        if name in skip and (name not in weights or weights[name].ndim == value.ndim):
            continue
        if name not in weights:
            raise CheckpointError(
                f"The checkpoint has no {name}, so its encoder is not that of --model; "
                "choose the model it was trained with."
            )
        if weights[name].shape != value.shape:
            raise CheckpointError(
                f"{name} is {tuple(weights[name].shape)} in the checkpoint but "
                f"{tuple(value.shape)} in the model; choose the --model (and --input_size, "
                "--patch_size, --in_chans) it was trained with."
            )


def check_architecture(model: nn.Module, checkpoint: dict, source: str) -> None:
    """Raises CheckpointError if read_pretrained found other counts than the model's.

    More blocks, or other heads of the same width, do not show in the shapes of the weights.
    """
    own = {"depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads}
    for name, value in checkpoint.get("encoder", {}).items():
        if value != own[name]:
            raise CheckpointError(
                f"{source} has {name} {value}, the model {own[name]}; choose the --model of its "
                "size."
            )


def init_from(model: nn.Module, checkpoint: dict, source: str) -> None:
    """--init_from: load the whole encoder, and the decoder if all of it fits.

    Args:
        source: the file's name, for the log.

    Raises:
        CheckpointError: the encoder is not that of the model.
    """
    check_architecture(model, checkpoint, source)
    weights, own = weights_of(checkpoint, source), model.state_dict()
    check_encoder(own, weights)
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    is_whole = len(fitting) == len(own)
    if not is_whole:
        fitting = {k: v for k, v in fitting.items() if k.startswith(ENCODER_PARTS)}
    model.load_state_dict(fitting, strict=False)
    logger.info(
        "Weights from %s: matched %d of %d tensors%s",
        *(source, len(fitting), len(own), "" if is_whole else "; decoder: newly initialized"),
    )


def load_strict(
    model: nn.Module, weights: dict[str, Tensor], source: str, trained_with: str = ""
) -> None:
    """Load every tensor.

    Args:
        trained_with: flags in which the file differs from this run, for the message.

    Raises:
        CheckpointError: the names or shapes differ; names the type of the file and the remedy.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if not (missing or unexpected or reshaped):
        model.load_state_dict(weights)
        return
    found, wanted = checkpoint_type(weights), checkpoint_type(own)
    if found != wanted:
        remedies = {"fine-tuned": "--finetune", "pre-training": "--init_from"}
        remedy = f"check the file (its first entries: {', '.join(list(weights)[:3])})"
        if found != "unknown" and wanted in remedies:
            remedy = f"to start from its encoder, give it to {remedies[wanted]} instead of --resume"
        raise CheckpointError(
            f"{source} is a {found} checkpoint, a {wanted} one is needed here; {remedy}."
        )
    examples = [f"missing {n}" for n in missing[:2]] + [
        f"not of this model {n}" for n in unexpected[:2]
    ]
    examples += [
        f"{n} is {tuple(weights[n].shape)}, not {tuple(own[n].shape)}" for n in reshaped[:2]
    ]
    remedy = "use the --model, sizes and decoder flags it was trained with"
    if trained_with:
        remedy = f"it was trained with {trained_with}: use the same"
    raise CheckpointError(f"{source} fits another model ({'; '.join(examples)}); {remedy}.")


def differing_flags(args, trained: dict) -> str:
    """Model flags of a checkpoint that differ from `args`, as they would be typed."""
    found = []
    for name in MODEL_FLAGS:
        stored, own = (
            list(value) if isinstance(value, tuple) else value
            for value in (trained.get(name), getattr(args, name, None))
        )
        if name not in trained or not hasattr(args, name) or stored == own:
            continue
        if name == "global_pool":
            found.append("--global_pool" if stored else "--cls_token")
        elif stored is None or isinstance(stored, bool):
            found.append(f"--{name}" if stored else f"no --{name}")
        else:
            values = stored if isinstance(stored, list) else [stored]
            found.append(f"--{name} {' '.join(map(str, values))}")
    return ", ".join(found)


def save_model(
    args, epoch: int, model, optimizer, loss_scaler, extra=None, name="checkpoint.pth", links=()
):
    """Write OUTPUT_DIR/name with model, optimizer, scaler and arguments.

    Args:
        epoch: the last finished one; -1 before the first is done.
        model: not wrapped in DDP.
        extra: more entries, plain values and tensors.
        links: further names of the same file.
    """
    checkpoint = {
        "model": {strip_prefixes(k): v for k, v in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "scaler": loss_scaler.state_dict(),
        "args": plain_args(args),
        **(extra or {}),
    }
    folder = Path(args.output_dir)
    write_checkpoint(checkpoint, folder / name, [folder / link for link in links])


def load_model(
    args, model_without_ddp, optimizer=None, loss_scaler=None, checkpoint: dict | None = None
) -> dict:
    """Load args.resume: weights, and with an optimizer also its state, the scaler and the epoch.

    Sets args.start_epoch to the epoch after the last finished one. Returns the checkpoint.

    Args:
        checkpoint: content of the file, if it was read before.

    Raises:
        CheckpointError: the file cannot be read, or belongs to another model.
    """
    checkpoint = checkpoint or read_checkpoint(args.resume)
    trained_with = differing_flags(args, checkpoint.get("args", {}))
    load_strict(model_without_ddp, weights_of(checkpoint, args.resume), args.resume, trained_with)
    logger.info("Resume checkpoint %s", args.resume)
    if optimizer is not None and "optimizer" in checkpoint and "epoch" in checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"], args.resume)
        args.start_epoch = checkpoint["epoch"] + 1
        if loss_scaler is not None and "scaler" in checkpoint:
            loss_scaler.load_state_dict(checkpoint["scaler"])
        logger.info("With optim & sched!")
    return checkpoint
