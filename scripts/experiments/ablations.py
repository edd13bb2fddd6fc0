"""Small ablations: each run changes one setting of a base.

    python scripts/experiments/ablations.py --data digits [--seeds 3]
    python scripts/experiments/ablations.py --data fashion-mnist --from DIR --seeds 1

digits: decoder depth, kept mask ratio and feature maps of CrossMAE. fashion-mnist: the recipe for
small data, on 10,000 of its images. Measured: the loss of every epoch, seconds, kNN accuracy of the
mean patch feature, and FLOPs.
"""

from functools import partial

import common
from pretraining_helps import ARMS, DATA, PIXELS, Experiment

from util.run.flags import add_flag

KEPT = f"--norm_pix_loss {common.CROSS} --kept_mask_ratio"
MAPS = "--norm_pix_loss --cross_mae --kept_mask_ratio 0.75"
BASE = ARMS["crossmae 0.25"]
RUNS = {
    "digits": {
        "CrossMAE": f"{KEPT} 0.75",
        "decoder 1": f"{KEPT} 0.75 --decoder_depth 1",
        "decoder 8": f"{KEPT} 0.75 --decoder_depth 8",
        "decoder 12": f"{KEPT} 0.75 --decoder_depth 12",
        "kept 0.15": f"{KEPT} 0.15",
        "kept 0.25": f"{KEPT} 0.25",
        "kept 0.5": f"{KEPT} 0.5",
        "last map": MAPS,  # the others have all seven: the encoder's input and its six blocks
        "3 maps": f"{MAPS} --weight_fm --use_fm 1 3 5",
        "MAE": ARMS["mae"],
        "MAE, decoder 8": "--norm_pix_loss --decoder_depth 8",
    },
    "fashion-mnist": {
        PIXELS: None,
        "base": BASE,
        "lr 5e-4": f"{BASE} --lr 5e-4",
        "lr 8e-3": f"{BASE} --lr 8e-3",
        "crop 0.5": f"{BASE} --crop_scale 0.5 1",
        "crop 0.8": f"{BASE} --crop_scale 0.8 1",
        "batch 32": f"{BASE} --batch_size 32",
        "pixels": BASE.replace("--norm_pix_loss", ""),
        "mask 0.5": f"{BASE} --mask_ratio 0.5 --kept_mask_ratio 0.17",
        "decoder 1": f"{BASE} --decoder_depth 1",
        "patch 8": f"{BASE} --patch_size 8",
        "mask 0.9": f"{BASE} --mask_ratio 0.9 --kept_mask_ratio 0.3",
    },
}
EPOCHS = {"digits": 20, "fashion-mnist": 8}
IMAGES = {"digits": ".", "fashion-mnist": "few"}


def main(args) -> None:
    experiment, data = Experiment(args.data, args), DATA[args.data]
    images, runs = experiment.images / IMAGES[args.data], RUNS[args.data]

    def measure(run: str, seed: int) -> dict:
        if run == PIXELS:
            return dict(knn=common.pixel_knn(images))
        folder = common.name_folder(args.out / f"ablations-{args.data}", run, seed)
        flags = f"{common.PRETRAIN} {data.pretrain} {data.flags} {runs[run]}"
        row = common.pretrain(f"{flags} --epochs {EPOCHS[args.data]} --seed {seed}", images, folder)
        return row | dict(knn=common.knn(folder / "checkpoint.pth", images, k=data.k))

    keys = [(run, seed) for seed in range(args.seeds) for run in runs]
    common.Results(f"ablations-{args.data}", "run", "seed").measure(measure, keys, args.jobs)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "out", "jobs", "seeds")
    flag = partial(add_flag, parser)
    flag("--data", str, "digits", "data set", choices=list(RUNS))
    flag("--from", str, "", "folder of Fashion-MNIST's files", dest="source", metavar="DIR")
    main(parser.parse_args())
