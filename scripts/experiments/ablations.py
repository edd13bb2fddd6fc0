"""Small ablations of CrossMAE: decoder depth, kept mask ratio, feature maps.

    python scripts/experiments/ablations.py [--seeds 5]

One encoder, 20 epochs of digits; each run changes one setting of the first. Measured: the loss of
every epoch, the seconds of the run, kNN accuracy, and GFLOP of the forward pass of one image.
"""

import common
from pretraining_helps import DATA, EPOCHS

import main_pretrain
from util.build import build_pretrain_model

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


def main(args) -> None:
    images = common.write_images(DATA["digits"].write, args.out / "digits")

    def measure(run: str, seed: int) -> dict:
        kept, depth, maps = RUNS[run]
        cross = "" if kept is None else f"--cross_mae --kept_mask_ratio {kept} {maps}"
        flags = f"{DATA['digits'].flags} --decoder_depth {depth} {cross}"
        folder = common.name_folder(args.out / "ablations", run, seed)
        run_flags = f"{flags} --epochs {EPOCHS} --seed {seed}"
        losses, seconds = common.pretrain(run_flags, images, folder)
        parsed = main_pretrain.get_args_parser().parse_args(f"{common.PRETRAIN} {flags}".split())
        ratios = (0.75, parsed.kept_mask_ratio)
        gflop, mparams = common.count_cost(lambda: build_pretrain_model(parsed), 32, ratios)
        row = dict(gflop=round(gflop, 4), mparams=round(mparams, 3), seconds=seconds)
        return row | dict(knn=common.knn(folder, images), losses=losses)

    runs = [(run, seed) for seed in range(args.seeds) for run in RUNS]
    common.Results("ablations", "run", "seed").measure(measure, runs, args.jobs)


if __name__ == "__main__":
    main(common.get_args_parser(__doc__, "out", "jobs", "seeds").parse_args())
