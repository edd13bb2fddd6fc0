"""What trained decoders attend to: MAE to visible and masked patches; weights of feature maps.

    python scripts/experiments/what_is_read.py [--seeds 5]

Uses the checkpoints of pretraining_helps.py; 200 validation images, mask ratio 0.75.
"""

import sys

import common

from tools.visualize import load_images, load_pretrained  # noqa: E402
from util.vis.attention_maps import READ, read_attention  # noqa: E402
from util.vis.reconstruction import draw_noise  # noqa: E402

NUM_IMAGES = 200


def main(args) -> None:
    results = common.Results("what_is_read", key=("arm", "seed"))
    if not (args.out / "digits/images").exists():
        sys.exit(f"There are no runs in {args.out}: run pretraining_helps.py first.")
    sources = [str(args.out / "digits/images/val")]
    for seed in range(args.seeds):
        for arm in ("mae", "crossmae 0.75"):
            if results.find(arm=arm, seed=seed) is not None:
                continue
            checkpoint = args.out / "digits" / f"{arm} {seed}".replace(" ", "-") / "checkpoint.pth"
            model, trained = load_pretrained(str(checkpoint))
            row = dict(arm=arm, seed=seed)
            if arm == "mae":
                noise = draw_noise(model, NUM_IMAGES, seed)
                attention = read_attention(
                    model, load_images(sources, NUM_IMAGES, trained), noise, 0.75, 0.75
                )
                row |= dict(zip(READ, attention.mass.tolist(), strict=True))  # one value per block
            else:
                row["map_weights"] = model.wfm.linear.weight.tolist()  # decoder blocks x maps
            results.add(**row)


if __name__ == "__main__":
    main(common.get_args_parser(__doc__.splitlines()[0]).parse_args())
