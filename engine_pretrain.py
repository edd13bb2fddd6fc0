"""One epoch of pre-training, for MAE and CrossMAE alike."""

from util.distributed import sync_gradients
from util.lr_sched import adjust_learning_rate
from util.optim import autocast, choose_amp_dtype
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
    """Train on one epoch of (imgs, anything) batches, imgs (B, C, H, W).

    A last group of batches smaller than accum_iter changes nothing: its gradients are dropped.

    Args:
        args: lr, min_lr, warmup_epochs, epochs, accum_iter, mask_ratio, kept_mask_ratio; optional
            amp, clip_grad, skip_nonfinite.
        state: where in the epoch to begin, what to do after an update (util.run.state.RunState).

    Returns:
        Mean of every meter over the epoch: lr, loss, grad_norm.

    Raises:
        NonFiniteLoss: on every process, once more steps than skip_nonfinite were not finite.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    amp_dtype = choose_amp_dtype(getattr(args, "amp", "auto"), device)
    clip_grad = getattr(args, "clip_grad", None)
    log = TrainLog(epoch, data_loader, "train_loss", log_writer, loss_scaler, args, state)

    for it, (imgs, _) in log.iterate():
        updates = (it + 1) % args.accum_iter == 0
        if it % args.accum_iter == 0:
            adjust_learning_rate(optimizer, it / len(data_loader) + epoch, args)
        imgs = imgs.to(device, non_blocking=True)

        with sync_gradients(model, updates):
            with autocast(device, amp_dtype):
                loss = model(imgs, mask_ratio=args.mask_ratio, kept_mask_ratio=args.kept_mask_ratio)
            loss_part = loss / args.accum_iter
            grad_norm = loss_scaler(loss_part, optimizer, clip_grad, update_grad=updates)
        if updates:
            optimizer.zero_grad(set_to_none=True)
        log.add(it, optimizer, loss, grad_norm)
    return log.finish()
