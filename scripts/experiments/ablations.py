"""Small ablations of CrossMAE: decoder depth, kept mask ratio, feature maps.

    python scripts/experiments/ablations.py [--seeds 5]

One encoder, 20 epochs of digits; each run changes one setting of the first. Measured: the loss of
every epoch, the seconds of the run, kNN accuracy, and GFLOP of the forward pass of one image.
"""

import common
import torch
from pretraining_helps import DATA, EPOCHS

import main_pretrain  # noqa: E402
from util.build import build_pretrain_model  # noqa: E402

ALL = "--weight_fm --use_input"  # the encoder's input and its six blocks
RUNS = {  # name: (kept mask ratio, decoder blocks, feature maps)
    "CrossMAE": (0.75, 4, ALL),
    "decoder 1": (0.75, 1, ALL),
    "decoder 8": (0.75, 8, ALL),
    "decoder 12": (0.75, 12, ALL),
    "kept 0.15": (0.15, 4, ALL),
    "kept 0.25": (0.25, 4, ALL),
    "kept 0.5": (0.5, 4, ALL),
    "last map": (0.75, 4, ""),
    "3 maps": (0.75, 4, "--weight_fm --use_fm 1 3 5"),
    "MAE": (None, 4, ""),
    "MAE, decoder 8": (None, 8, ""),
}


def flags_of(run: str) -> str:
    """The command line of a run."""
    kept, depth, maps = RUNS[run]
    cross = "" if kept is None else f"--cross_mae --kept_mask_ratio {kept} {maps}"
    return f"{DATA['digits'].flags} --decoder_depth {depth} {cross}"


def main(args) -> None:
    results = common.Results("ablations", key=("run", "seed"))
    images = common.write_images(DATA["digits"].write, args.out / "digits")

    def measure(run: str, seed: int) -> None:
        if results.find(run=run, seed=seed) is not None:
            return
        folder = args.out / "ablations" / f"{run} {seed}".replace(" ", "-").replace(",", "")
        flags = flags_of(run)
        losses, seconds = common.pretrain(
            f"{flags} --epochs {EPOCHS} --seed {seed}", images, folder
        )
        parsed = main_pretrain.get_args_parser().parse_args(f"{common.PRETRAIN} {flags}".split())
        with torch.device("meta"):
            model = build_pretrain_model(parsed)
        gflop, mparams = common.count_cost(model, 32, (0.75, parsed.kept_mask_ratio))
        row = dict(gflop=round(gflop, 4), mparams=round(mparams, 3), seconds=seconds)
        row |= dict(knn=common.knn(folder / "checkpoint.pth", images), losses=losses)
        results.add(run=run, seed=seed, **row)

    for seed in range(args.seeds):
        common.run_all(args.jobs, measure, [(run, seed) for run in RUNS])


if __name__ == "__main__":
    main(common.get_args_parser(__doc__.splitlines()[0]).parse_args())
