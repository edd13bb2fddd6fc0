"""What trained decoders attend to: MAE to visible and masked patches; weights of feature maps.

    python scripts/experiments/what_is_read.py [--seeds 5]

Uses the checkpoints of pretraining_helps.py; 200 validation images, mask ratio 0.75.
"""

import sys
from itertools import product

import common

from tools.visualize import load_images, load_pretrained
from util.vis.attention_maps import READ, read_attention
from util.vis.reconstruction import draw_noise

NUM_IMAGES = 200


def main(args) -> None:
    results = common.Results("what_is_read", "arm", "seed")
    if not (args.out / "digits/images").exists():
        sys.exit(f"There are no runs in {args.out}: run pretraining_helps.py first.")

    def measure(arm: str, seed: int) -> dict:
        folder = common.name_folder(args.out / "digits", arm, seed)
        model, trained = load_pretrained(str(folder / "checkpoint.pth"))
        if arm != "mae":
            return dict(map_weights=model.wfm.linear.weight.tolist())  # decoder blocks x maps
        noise = draw_noise(model, NUM_IMAGES, seed)
        imgs = load_images([str(args.out / "digits/images/val")], NUM_IMAGES, trained)
        mass = read_attention(model, imgs, noise, 0.75, 0.75).mass
        return dict(zip(READ, mass.tolist(), strict=True))  # one value per block

    runs = product(("mae", "crossmae 0.75"), range(args.seeds))
    results.measure(measure, runs)


if __name__ == "__main__":
    main(common.get_args_parser(__doc__, "out", "seeds").parse_args())
