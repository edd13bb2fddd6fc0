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
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.data.remote import localize
from util.eval.inference import add_inference_flags, describe_transform, load_for_inference
from util.eval.knn import evaluate_knn, list_splits
from util.eval.report import few_classes_note
from util.run.checks import check_ranges
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch

logger = logging.getLogger(__name__)


def get_args_parser() -> FlagParser:
    parser = FlagParser("python -m tools.knn", description=__doc__.splitlines()[0])
    flag = partial(add_flag, parser)
    flag("--data_path", str, None, "folder with train/ and val/", required=True)
    flag("--shard_cache", str, None, "where shards at a URL are copied to", metavar="DIR")
    text = "numbers of neighbors, at most all training images (default: 1 5 10 20 100)"
    flag("--k", int, [1, 5, 10, 20, 100], text, nargs="+")
    flag("--temperature", float, 0.07, "T of the vote")
    flag("--json", bool, False, "end with all results as one line of JSON")
    add_inference_flags(parser, batch_size=256)
    return parser


def main(args: argparse.Namespace) -> None:
    check_ranges(args, {"temperature": "(0, inf]", "k": "[1, inf)"})
    data = localize(args.data_path, args.shard_cache, "train", "val")
    classes, train, val = list_splits(data)
    model, trained, which = load_for_inference(args)
    logger.info("%s of %s, %s", which, trained.model, args.checkpoint)
    logger.info("train/ (%d) and val/ (%d): %s", len(train), len(val), describe_transform(trained))
    results = evaluate_knn(
        model,
        classes,
        train,
        val,
        trained,
        which=which,
        ks=args.k,
        temperature=args.temperature,
        amp_dtype=trained.amp_dtype,
    )
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
