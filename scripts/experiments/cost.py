"""FLOPs and parameters of the published models, against those of the public implementation.

    python scripts/experiments/cost.py

Forward pass of one image, 2 FLOPs per multiply-add, on the meta device, so it takes seconds. For
speed and memory see tools.benchmark.
"""

from itertools import product

import common
from torch import nn

import models_cross
import models_mae
import models_vit

SIZES = {
    "S/16": ("small_patch16", 224),
    "B/16": ("base_patch16", 224),
    "L/16": ("large_patch16", 224),
    "H/14": ("huge_patch14", 224),
    "B/16 448": ("base_patch16", 448),
}
# name: (decoder depth, kept mask ratio, GFLOP/million trainable parameters of the public
# implementation for each of SIZES, counted the same way).
MODELS = {
    "MAE, 8 blocks": (8, None, "5.17/28.2 19.56/111.7 41.51/329.2 97.12/656.6 86.2/-"),
    "MAE, 12 blocks": (12, None, "6.57/31.4 24.84/124.3 46.79/341.9 104.13/669.2 -/-"),
    "CrossMAE 0.75, 12 blocks": (12, 0.75, "4.99/32.1 19.32/127.0 41.59/347.6 97.48/678.0 79.9/-"),
    "CrossMAE 0.25, 12 blocks": (12, 0.25, "3.35/32.1 12.95/127.0 35.22/347.6 89.14/678.0 53.0/-"),
    "CrossMAE 0.25, 8 blocks": (8, 0.25, "3.00/28.6 11.59/113.4 33.75/332.9 87.07/662.3 -/-"),
    "CrossMAE 0.25, 1 block": (1, 0.25, "2.39/22.6 9.20/89.5 31.16/307.2 83.43/634.7 -/-"),
    "classifier": (None, None, "9.20/22.05 35.13/86.57 123.1/304.3 334.6/632.1 -/-"),
}


def build(model: str, size: str) -> nn.Module:
    (depth, kept, _), (factory, pixels) = MODELS[model], SIZES[size]
    if depth is None:
        return getattr(models_vit, f"vit_{factory}")(img_size=pixels)
    flags = dict(img_size=pixels, decoder_depth=depth, norm_pix_loss=True)
    if kept is None:
        return getattr(models_mae, f"mae_vit_{factory}")(**flags)
    return getattr(models_cross, f"mae_vit_{factory}")(**flags, weight_fm=True, use_input=True)


def measure(model: str, size: str) -> dict:
    depth, kept, known = MODELS[model]
    ratios = () if depth is None else (0.75, kept or 0.75)
    gflop, mparams = common.count_cost(lambda: build(model, size), SIZES[size][1], ratios)
    known = known.split()[list(SIZES).index(size)].split("/")
    known_gflop, known_mparams = (float(x) if x != "-" else None for x in known)
    row = dict(gflop=round(gflop, 3), mparams=round(mparams, 2))
    return row | dict(known_gflop=known_gflop, known_mparams=known_mparams)


if __name__ == "__main__":
    common.get_args_parser(__doc__).parse_args()
    common.Results("cost", "model", "size").measure(measure, product(MODELS, SIZES))
