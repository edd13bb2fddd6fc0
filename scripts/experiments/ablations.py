"""Small ablations of CrossMAE: decoder depth, kept mask ratio, feature maps.

    python scripts/experiments/ablations.py [--seeds 5]

One encoder, 20 epochs of digits; each run changes one setting of the first. Measured: the loss of
every epoch, the seconds of the run, kNN accuracy, and GFLOP of the forward pass of one image.
"""

import common
from pretraining_helps import DATA, EPOCHS

import main_pretrain
from util.build import build_pretrain_model

KEPT = f"{common.CROSS} --kept_mask_ratio"
MAPS = "--cross_mae --kept_mask_ratio 0.75 --decoder_depth 4"
RUNS = {
    "CrossMAE": f"{KEPT} 0.75 --decoder_depth 4",
    "decoder 1": f"{KEPT} 0.75 --decoder_depth 1",
    "decoder 8": f"{KEPT} 0.75 --decoder_depth 8",
    "decoder 12": f"{KEPT} 0.75 --decoder_depth 12",
    "kept 0.15": f"{KEPT} 0.15 --decoder_depth 4",
    "kept 0.25": f"{KEPT} 0.25 --decoder_depth 4",
    "kept 0.5": f"{KEPT} 0.5 --decoder_depth 4",
    "last map": MAPS,  # the others have all seven: the encoder's input and its six blocks
    "3 maps": f"{MAPS} --weight_fm --use_fm 1 3 5",
    "MAE": "--decoder_depth 4",
    "MAE, decoder 8": "--decoder_depth 8",
}


def main(args) -> None:
    results = common.Results("ablations", "run", "seed")
    images = common.write_images(DATA["digits"].write, args.out / "digits")

    def measure(run: str, seed: int) -> dict:
        folder = common.name_folder(args.out / "ablations", run, seed)
        flags = f"{DATA['digits'].flags} {RUNS[run]} --epochs {EPOCHS} --seed {seed}"
        losses, seconds = common.pretrain(flags, images, folder)
        parsed = main_pretrain.get_args_parser().parse_args(f"{common.PRETRAIN} {flags}".split())
        ratios = (0.75, parsed.kept_mask_ratio)
        gflop, mparams = common.count_cost(lambda: build_pretrain_model(parsed), 32, ratios)
        row = dict(gflop=round(gflop, 4), mparams=round(mparams, 3), seconds=seconds)
        return row | dict(knn=common.knn(folder, images), losses=losses)

    runs = [(run, seed) for seed in range(args.seeds) for run in RUNS]
    results.measure(measure, runs, args.jobs)


if __name__ == "__main__":
    main(common.get_args_parser(__doc__, "out", "jobs", "seeds").parse_args())
