"""Learning rate over fractional epochs: linear warm-up from 0, half a cosine to min_lr."""

import math


def adjust_learning_rate(optimizer, epoch: float, args) -> float:
    """Set the learning rate of every group and return it (before the groups' lr_scale).

    Args:
        epoch: fractional epoch.
        args: lr (peak), min_lr, warmup_epochs, epochs.
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
