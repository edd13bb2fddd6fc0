"""The moving average of the weights in checkpoints (--model_ema)."""

import logging

from torch import nn

from util.checkpoint import load_strict
from util.io.errors import CheckpointError

logger = logging.getLogger(__name__)


def with_ema_weights(checkpoint: dict, source: str) -> dict:
    """The checkpoint with the moving average of --model_ema as its weights.

    Raises:
        CheckpointError: it has none.
    """
    if "model_ema" not in checkpoint:
        raise CheckpointError(
            f"{source} holds no average of the weights; leave --model_ema out, or train with it."
        )
    return {**checkpoint, "model": checkpoint["model_ema"]}


def restore_ema(ema, model: nn.Module, checkpoint: dict, source: str) -> None:
    """Continue the moving average of a checkpoint, or start one from its weights.

    Args:
        ema: timm's ModelEmaV3, or None.
    """
    if ema is None:
        if "model_ema" in checkpoint:
            logger.warning("The average in %s ends here: --model_ema is not given", source)
    elif "model_ema" in checkpoint:
        load_strict(ema.module, with_ema_weights(checkpoint, source)["model"], source)
    else:
        ema.set(model)
        logger.warning("%s holds no average: it starts from its weights", source)
