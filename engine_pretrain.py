"""One epoch of pre-training, for MAE and CrossMAE alike."""

from util.casts import CastWeights
from util.distributed import sync_gradients
from util.lr_sched import adjust_learning_rate
from util.optim import autocast
from util.run.train_log import TrainLog


def train_one_epoch(
    model,
    data_loader,
    optimizer,
    device,
    epoch,
    loss_scaler,
    log_writer=None,
    args=None,
    state=None,
) -> dict[str, float]:
    """Train for one epoch of (imgs, anything) batches, imgs (B, C, H, W).

    Batches left over by accum_iter change nothing: their gradients are dropped.

    Args:
        loss_scaler: util.optim.NativeScalerWithGradNormCount; it also holds the autocast dtype.
        args: lr, min_lr, warmup_epochs, epochs, accum_iter, mask_ratio, kept_mask_ratio; optional
            clip_grad, skip_nonfinite.
        state: util.run.state.RunState: where the epoch starts; saves, and may stop the run.

    Returns:
        Mean of every meter over the epoch: lr, loss, grad_norm.

    Raises:
        NonFiniteLoss: on every rank, once more steps than skip_nonfinite were not finite.
        Interrupted: on every rank, after saving, once any rank got a stop signal.
    """
    model.train()
    forward = CastWeights(model)
    optimizer.zero_grad(set_to_none=True)
    clip_grad = getattr(args, "clip_grad", None)
    log = TrainLog(epoch, data_loader, "train_loss", log_writer, loss_scaler, args, state)

    for it, (imgs, _) in log.iterate():
        is_step = (it + 1) % args.accum_iter == 0
        if it % args.accum_iter == 0:
            adjust_learning_rate(optimizer, it / len(data_loader) + epoch, args)
        imgs = imgs.to(device, non_blocking=True)  # no copy after DeviceLoader

        with sync_gradients(model, is_step):
            with autocast(device, loss_scaler.amp_dtype):
                loss = forward(
                    imgs, mask_ratio=args.mask_ratio, kept_mask_ratio=args.kept_mask_ratio
                )
            grad_norm = loss_scaler(
                loss / args.accum_iter, optimizer, clip_grad, update_grad=is_step
            )
        log.add(it, optimizer, loss, grad_norm)
        if is_step:
            optimizer.zero_grad(set_to_none=True)
            if state is not None:
                state.after_step(it + 1, log)
    return log.finish()
