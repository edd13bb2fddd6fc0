"""One epoch of fine-tuning, and the evaluation."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from util.casts import CastWeights
from util.distributed import all_reduce_max, all_reduce_sum, sync_gradients
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
    """Train for one epoch of (imgs, labels) batches, imgs (B, C, H, W), labels (B,).

    Batches left over by accum_iter change nothing: their gradients are dropped.

    Args:
        criterion: loss of logits and labels, or of logits and soft targets with mixup_fn.
        loss_scaler: util.optim.NativeScalerWithGradNormCount; it also holds the autocast dtype.
        max_norm: largest gradient norm, or None.
        args: lr, min_lr, warmup_epochs, epochs, accum_iter; optional skip_nonfinite.
        state: util.run.state.RunState: where the epoch starts; saves, and may stop the run.

    Returns:
        Mean of every meter over the epoch: lr (of the fastest group), loss, grad_norm.

    Raises:
        NonFiniteLoss: on every rank, once more steps than skip_nonfinite were not finite.
        Interrupted: on every rank, after saving, once any rank got a stop signal.
    """
    model.train()
    forward = CastWeights(model)
    optimizer.zero_grad(set_to_none=True)
    log = TrainLog(epoch, data_loader, "loss", log_writer, loss_scaler, args, state)

    for it, (imgs, labels) in log.iterate():
        is_step = (it + 1) % args.accum_iter == 0
        if it % args.accum_iter == 0:
            adjust_learning_rate(optimizer, it / len(data_loader) + epoch, args)
        imgs = imgs.to(device, non_blocking=True)  # no copy after DeviceLoader
        labels = labels.to(device, non_blocking=True)
        if mixup_fn is not None:
            imgs, labels = mixup_fn(imgs, labels)

        with sync_gradients(model, is_step):
            with autocast(device, loss_scaler.amp_dtype):
                logits = forward(imgs)
            loss = criterion(logits.float(), labels)
            grad_norm = loss_scaler(
                loss / args.accum_iter, optimizer, max_norm, update_grad=is_step
            )
        log.add(it, optimizer, loss, grad_norm)
        if is_step:
            optimizer.zero_grad(set_to_none=True)
            if state is not None:
                state.after_step(it + 1, log)
    return log.finish()


@torch.inference_mode()
def evaluate(
    data_loader, model, device, amp_dtype="auto", confusion: Tensor | None = None
) -> dict[str, float]:
    """Accuracy and loss over (imgs, labels) batches; each rank may hold a part of the images.

    Args:
        amp_dtype: autocast dtype, None for float32, "auto" for what choose_amp_dtype takes.
        confusion: counts (classes, classes), rows true, columns predicted; this rank's images are
            added.

    Returns:
        acc1 and acc5 in percent and loss (cross entropy): means over images; mean_class in percent:
        mean over classes of their acc1. None depends on the batch size or the world size.
    """
    model.eval()
    if amp_dtype == "auto":
        amp_dtype = choose_amp_dtype("auto", device)
    metric_logger = MetricLogger()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    per_class = torch.zeros(2, 0, dtype=torch.float64, device=device)  # correct, images
    unread = []  # loss and accuracies of batches, still on the device

    def read() -> None:
        for loss, acc1, acc5 in torch.stack(unread).tolist():
            metric_logger.update(loss=loss, acc1=100 * acc1, acc5=100 * acc5)
        unread.clear()

    for _, (imgs, labels) in metric_logger.log_every(data_loader, 10, "Test:", before_print=read):
        imgs = imgs.to(device, non_blocking=True)  # no copy after DeviceLoader
        labels = labels.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            logits = model(imgs)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        if confusion is not None:
            cells = labels * len(confusion) + best[:, 0]
            confusion.view(-1).index_add_(0, cells, torch.ones_like(cells))
        sums, class_sums = sum_batch(logits, best, labels)
        totals += sums
        # The first batch shows the number of classes; a rank may have no batch.
        per_class = per_class + class_sums if per_class.numel() else class_sums
        unread.append(sums[:3] / sums[3])

    all_reduce_sum(totals)
    loss, acc1, acc5 = (totals[:3] / totals[3]).tolist()
    stats = {"loss": loss, "acc1": 100 * acc1, "acc5": 100 * acc5}
    stats["mean_class"] = 100 * average_classes(per_class)
    logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", stats["acc1"], stats["acc5"], stats["loss"])
    logger.info("Mean per-class accuracy: %.3f", stats["mean_class"])
    return stats


def sum_batch(logits: Tensor, best: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a batch in float64, to be added up over batches and ranks.

    Args:
        logits: (B, classes).
        best: (B, at most 5) classes, the most probable first.

    Returns:
        (4,): loss, top-1 correct, top-5 correct, images; and (2, classes): top-1 correct and images
        of each class.
    """
    loss = F.cross_entropy(logits, labels, reduction="sum")
    correct = best == labels.unsqueeze(1)
    count = torch.tensor(len(labels), device=logits.device)
    totals = torch.stack([loss, correct[:, 0].sum(), correct.sum(), count]).double()
    of_class = F.one_hot(labels, logits.shape[1]).double()  # (B, classes)
    return totals, torch.stack([correct[:, 0].double() @ of_class, of_class.sum(0)])


def average_classes(per_class: Tensor) -> float:
    """Mean of the accuracies of the classes that have images, over all ranks.

    per_class: correct and all images of each class, (2, classes); (2, 0) on a rank without images.
    """
    (num_classes,) = all_reduce_max([per_class.shape[1]], per_class.device)
    per_class = F.pad(per_class, (0, int(num_classes) - per_class.shape[1]))
    correct, count = all_reduce_sum(per_class)
    return (correct / count)[count > 0].mean().item()
