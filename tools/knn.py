"""k-nearest-neighbor accuracy of frozen features.

    python -m tools.knn --checkpoint C --data_path DIR

Every image of DIR/val is assigned the class that its k nearest images of DIR/train (by cosine
similarity) vote for, each with weight exp(similarity / T), as in DINO (arXiv 2104.14294). Both
folders go through the evaluation transform. A class without a vote is not a prediction.

Shapes: B query images, M training images, D encoder width, K classes, k neighbors.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.build import load_trained
from util.data.sources import check_same_classes, list_classes
from util.eval.inference import (
    add_inference_flags,
    build_inference_loader,
    default_feature,
    describe_transform,
    run_features,
    set_inference_flags,
)
from util.eval.report import few_classes_note
from util.io.errors import UserError
from util.run.checks import check_ranges
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch

logger = logging.getLogger(__name__)

CHUNK = 32768  # training images compared at once


def get_args_parser() -> FlagParser:
    parser = FlagParser("python -m tools.knn", description=__doc__.splitlines()[0])
    flag = partial(add_flag, parser)
    flag("--data_path", str, None, "folder with train/ and val/", required=True)
    text = "numbers of neighbors (default: 1 5 10 20 100)"
    flag("--k", int, [1, 5, 10, 20, 100], text, nargs="+")
    flag("--temperature", float, 0.07, "T of the vote")
    text = "class token or mean of the patches (default: what the model's head reads; of a "
    flag("--which", str, None, text + "pre-training checkpoint cls)", choices=["cls", "mean"])
    flag("--json", bool, False, "end with all results as one line of JSON")
    add_inference_flags(parser, batch_size=256)
    return parser


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
        queries: batches of features (B, D) and labels (B,).
    """
    bank = F.normalize(bank, dim=1)
    correct, total = dict.fromkeys(ks, 0), 0
    for features, labels in queries:
        near, ids = find_nearest(F.normalize(features, dim=1), bank, max(ks), chunk)
        voters = bank_labels[ids]  # (B, max k)
        for k in ks:
            scores = vote(near[:, :k], voters[:, :k], num_classes, temperature)
            correct[k] = correct[k] + count_correct(scores, labels)
        total += len(labels)
    return {k: tuple(100 * count / total for count in correct[k].tolist()) for k in ks}


def choose_ks(ks: list[int], num_train: int) -> list[int]:
    """The k that are at most the number of training images, ascending."""
    if min(ks) < 1:
        raise UserError(f"--k holds {min(ks)}; it must be at least 1.")
    possible = sorted({k for k in ks if k <= num_train})
    left_out = sorted(set(ks) - set(possible))
    if not possible:
        raise UserError(
            f"--k {' '.join(map(str, ks))} does not fit {num_train} training images; "
            f"choose from 1 to {num_train}."
        )
    if left_out:
        names = ", ".join(map(str, left_out))
        logger.warning("Left out k = %s: there are %d training images", names, num_train)
    return possible


def list_splits(data_path: str) -> tuple[list[str], list, list]:
    """Class names, and (path, class index) of train/ and of val/.

    Raises:
        UserError: one of them is missing or has an empty class, or their classes differ.
    """
    train, val = (list_classes(Path(data_path, split)) for split in ("train", "val"))
    check_same_classes(data_path, train.classes, val.classes)
    return train.classes, train.samples, val.samples


def main(args: argparse.Namespace) -> None:
    check_ranges(args, {"temperature": "(0, inf]"})
    classes, train, val = list_splits(args.data_path)
    ks = choose_ks(args.k, len(train))
    model, trained = load_trained(args.checkpoint, model=args.model, model_ema=args.model_ema)
    set_inference_flags(trained, args)
    which = args.which or default_feature(model)
    model.to(trained.device)
    logger.info("%s of %s, %s", which, trained.model, args.checkpoint)
    logger.info("train/ (%d) and val/ (%d): %s", len(train), len(val), describe_transform(trained))

    def features(samples, title):
        loader = build_inference_loader(samples, classes, trained)
        return run_features(model, loader, which, trained.device, trained.amp_dtype, title)

    bank, labels = (torch.cat(parts) for parts in zip(*features(train, "train"), strict=True))
    queries = features(val, "val")
    results = measure_knn(bank, labels, queries, ks, args.temperature, len(classes))
    for k, (acc1, acc5) in results.items():
        print(f"kNN k={k} T={args.temperature:g}: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}")
    if note := few_classes_note(len(classes)):
        logger.info(note)
    if args.json:
        rows = [{"k": k, "acc1": acc1, "acc5": acc5} for k, (acc1, acc5) in results.items()]
        setup = dict(checkpoint=args.checkpoint, which=which, temperature=args.temperature)
        print(json.dumps(setup | dict(train=len(train), val=len(val), knn=rows)), flush=True)


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
