"""k-nearest-neighbor accuracy of frozen features, also during pre-training (--knn_every).

Shapes: B query images, M training images, D encoder width, K classes, k neighbors.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.data.labels import check_same_classes, list_labeled, order_classes
from util.data.remote import localize
from util.distributed import all_gather_rows, all_reduce_sum
from util.eval.inference import build_inference_loader, run_features

logger = logging.getLogger(__name__)

CHUNK = 32768  # training images compared at once
ONLINE_K, ONLINE_TEMPERATURE = 20, 0.07  # of DINO (arXiv 2104.14294)


def find_nearest(queries: Tensor, bank: Tensor, count: int, chunk: int = CHUNK):
    """The `count` nearest rows of bank (M, D) to each of queries (B, D), the nearest first.

    All rows have length 1. Returns similarities (B, count) and row indices (B, count); at most
    B x chunk similarities are held at a time.
    """
    near = queries.new_empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), chunk):
        similar = queries @ bank[start : start + chunk].T  # (B, chunk)
        best = similar.topk(min(count, similar.shape[1]), dim=1)
        near = torch.cat([near, best.values], dim=1)
        ids = torch.cat([ids, best.indices + start], dim=1)
        near, order = near.topk(min(count, near.shape[1]), dim=1)
        ids = ids.gather(1, order)
    return near, ids


def vote(near: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Scores (B, K) from similarities (B, k), the nearest first, and neighbors' labels (B, k).

    exp(similarity / T), relative to the nearest so that no temperature overflows.
    """
    weights = ((near.double() - near[:, :1]) / temperature).exp()
    scores = torch.zeros(len(near), num_classes, dtype=torch.float64, device=near.device)
    return scores.scatter_add_(1, labels, weights)


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Correct top-1 and top-5 predictions (2,) of scores (B, K)."""
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    correct = (best.indices == labels.unsqueeze(1)) & (best.values > 0)
    return torch.stack([correct[:, 0].sum(), correct.sum()])


def measure_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Iterable[tuple[Tensor, Tensor]],
    ks: list[int],
    temperature: float,
    num_classes: int,
    chunk: int = CHUNK,
) -> dict[int, tuple[float, float]]:
    """{k: (Acc@1, Acc@5)} in percent.

    Args:
        bank: training features (M, D); bank_labels (M,).
        queries: batches of features (B, D) and labels (B,), of this rank.
    """
    bank = F.normalize(bank, dim=1)
    counts = torch.zeros(len(ks) + 1, 2, dtype=torch.int64, device=bank.device)
    for features, labels in queries:
        near, ids = find_nearest(F.normalize(features, dim=1), bank, max(ks), chunk)
        voters = bank_labels[ids]  # (B, max k)
        for i, k in enumerate(ks):
            scores = vote(near[:, :k], voters[:, :k], num_classes, temperature)
            counts[i] += count_correct(scores, labels)
        counts[-1] += len(labels)
    *correct, (total, _) = all_reduce_sum(counts).tolist()
    return {k: tuple(100 * x / total for x in pair) for k, pair in zip(ks, correct, strict=True)}


def list_splits(data_path: str) -> tuple[list[str], list, list]:
    """Class names, and (path, class index) of train/ and of val/.

    Raises:
        UserError: one of them is missing or has an empty class, or their classes differ.
    """
    train, val = (list_labeled(Path(data_path, split)) for split in ("train", "val"))
    check_same_classes(data_path, train.classes, val.classes)
    return train.classes, train.samples, order_classes(val, train.classes).samples


def evaluate_knn(
    model: nn.Module,
    classes: list[str],
    train: list,
    val: list,
    args,
    *,
    which: str,
    ks: Iterable[int],
    temperature: float,
    amp_dtype: torch.dtype | None,
) -> dict[int, tuple[float, float]]:
    """{k: (Acc@1, Acc@5)} in percent; a k above the number of training images counts as that.

    Each rank extracts its part of the images; all of them hold the features of train/.

    Args:
        classes, train, val: of list_splits.
        args: those of the model; images go through its evaluation transform.
        which: "cls", "mean", or "patches" one after the other.
    """

    def features(samples, title):
        loader = build_inference_loader(samples, classes, args, split=True)
        found = run_features(model, loader, which, args.device, amp_dtype, title)
        return ((x.flatten(1), labels) for x, labels in found)

    width = model.embed_dim * (model.patch_embed.num_patches if which == "patches" else 1)
    empty = (  # a rank without images has this to concatenate
        torch.zeros(0, width, device=args.device),
        torch.zeros(0, dtype=torch.int64, device=args.device),
    )
    batches = [empty, *features(train, "kNN train")]
    bank, labels = (all_gather_rows(torch.cat(x)) for x in zip(*batches, strict=True))
    ks = sorted({min(k, len(bank)) for k in ks})
    return measure_knn(bank, labels, features(val, "kNN val"), ks, temperature, len(classes))


class OnlineKnn:
    """Accuracy of the class token every few epochs of pre-training; draws no random number."""

    def __init__(self, args):
        """
        Args:
            args: those of the run; images go through the evaluation transform of its input size.

        Raises:
            UserError: --knn_data is not a folder with train/ and val/, or is a URL that cannot be
                copied.
        """
        self.args = args
        if args.knn_every:
            data = localize(args.knn_data, args.shard_cache, "train", "val")
            self.classes, *self.splits = list_splits(data)

    def measure(self, model, epoch: int, amp_dtype, writer=None) -> dict[str, float]:
        """knn_acc1 and knn_acc5 after this epoch, in percent; {} where it is not due."""
        args = self.args
        is_last = epoch + 1 == args.epochs
        if not args.knn_every or ((epoch + 1) % args.knn_every and not is_last):
            return {}
        # --compile is for the shapes of training: whole images would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            found = evaluate_knn(
                model,
                self.classes,
                *self.splits,
                args,
                which="cls",
                ks=[ONLINE_K],
                temperature=ONLINE_TEMPERATURE,
                amp_dtype=amp_dtype,
            )
        ((k, (acc1, acc5)),) = found.items()  # k is smaller where there are fewer training images
        stats = {"knn_acc1": acc1, "knn_acc5": acc5}
        logger.info("kNN k=%d: Acc@1 %.3f Acc@5 %.3f", k, acc1, acc5)
        if writer is not None:
            for name, value in stats.items():
                writer.add_scalar(f"perf/{name}", value, epoch)
        return stats
