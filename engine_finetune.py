"""One epoch of fine-tuning, and the evaluation."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from util.distributed import all_reduce_sum, sync_gradients
from util.lr_sched import adjust_learning_rate
from util.metrics import MetricLogger
from util.optim import autocast, choose_amp_dtype
from util.run.train_log import TrainLog

logger = logging.getLogger(__name__)


def train_one_epoch(
    model,
    criterion,
    data_loader,
    optimizer,
    device,
    epoch,
    loss_scaler,
    max_norm=None,
    mixup_fn=None,
    log_writer=None,
    args=None,
    state=None,
) -> dict[str, float]:
    """Train on one epoch of (imgs, labels) batches, imgs (B, C, H, W), labels (B,).

    A last group of batches smaller than accum_iter changes nothing: its gradients are dropped.

    Args:
        criterion: loss of logits and labels, or of logits and class shares where mixup_fn is given.
        max_norm: largest gradient norm, or None.
        args: lr, min_lr, warmup_epochs, epochs, accum_iter; optional amp, skip_nonfinite.
        state: where in the epoch to begin, what to do after an update (util.run.state.RunState).

    Returns:
        Mean of every meter over the epoch: lr (of the fastest group), loss, grad_norm.

    Raises:
        NonFiniteLoss: on every process, once more steps than skip_nonfinite were not finite.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    amp_dtype = choose_amp_dtype(getattr(args, "amp", "auto"), device)
    log = TrainLog(epoch, data_loader, "loss", log_writer, loss_scaler, args, state)

    for it, (imgs, labels) in log.iterate():
        updates = (it + 1) % args.accum_iter == 0
        if it % args.accum_iter == 0:
            adjust_learning_rate(optimizer, it / len(data_loader) + epoch, args)
        imgs = imgs.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        if mixup_fn is not None:
            imgs, labels = mixup_fn(imgs, labels)

        with sync_gradients(model, updates):
            with autocast(device, amp_dtype):
                logits = model(imgs)
            loss = criterion(logits.float(), labels)
            loss_part = loss / args.accum_iter
            grad_norm = loss_scaler(loss_part, optimizer, max_norm, update_grad=updates)
        if updates:
            optimizer.zero_grad(set_to_none=True)
        log.add(it, optimizer, loss, grad_norm)
    return log.finish()


@torch.inference_mode()
def evaluate(data_loader, model, device, amp: str = "auto") -> dict[str, float]:
    """Accuracy and loss over (imgs, labels) batches; each process may hold another part of the
    images.

    Returns:
        acc1 and acc5 in percent and loss (cross entropy), means over images: they depend neither on
        the batch size nor on the number of processes.
    """
    model.eval()
    amp_dtype = choose_amp_dtype(amp, device)
    metric_logger = MetricLogger()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    for _, (imgs, labels) in metric_logger.log_every(data_loader, 10, "Test:"):
        imgs = imgs.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            logits = model(imgs)
        batch = score(logits.float(), labels)
        totals += batch
        loss, acc1, acc5 = (batch[:3] / batch[3]).tolist()
        metric_logger.update(loss=loss, acc1=100 * acc1, acc5=100 * acc5)

    loss, acc1, acc5 = (all_reduce_sum(totals)[:3] / totals[3]).tolist()
    stats = {"loss": loss, "acc1": 100 * acc1, "acc5": 100 * acc5}
    logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", stats["acc1"], stats["acc5"], stats["loss"])
    return stats


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Float64 sums of a batch, logits (B, classes): loss, correct at 1, correct at 5, images."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
    correct = best == labels.unsqueeze(1)
    count = torch.tensor(len(labels), device=logits.device)
    return torch.stack([loss, correct[:, 0].sum(), correct.sum(), count]).double()
