"""FLOPs and parameters of the published models, against those of the public implementation.

    python scripts/experiments/cost.py

Forward pass of one image, 2 FLOPs per multiply-add, on the meta device, so it takes seconds. For
speed and memory see tools.benchmark.
"""

import common
import torch

import models_cross  # noqa: E402
import models_mae  # noqa: E402
import models_vit  # noqa: E402

SIZES = {
    "S/16": ("small_patch16", 224),
    "B/16": ("base_patch16", 224),
    "L/16": ("large_patch16", 224),
    "H/14": ("huge_patch14", 224),
    "B/16 448": ("base_patch16", 448),
}
MODELS = {  # name: (decoder depth, kept mask ratio); None where the model has none
    "MAE, 8 blocks": (8, None),
    "MAE, 12 blocks": (12, None),
    "CrossMAE 0.75, 12 blocks": (12, 0.75),
    "CrossMAE 0.25, 12 blocks": (12, 0.25),
    "CrossMAE 0.25, 8 blocks": (8, 0.25),
    "CrossMAE 0.25, 1 block": (1, 0.25),
    "classifier": (None, None),
}
# GFLOP and million trainable parameters of the public implementation, counted the same way.
KNOWN = {
    "MAE, 8 blocks": "5.17/28.2 19.56/111.7 41.51/329.2 97.12/656.6 86.2/-",
    "MAE, 12 blocks": "6.57/31.4 24.84/124.3 46.79/341.9 104.13/669.2 -/-",
    "CrossMAE 0.75, 12 blocks": "4.99/32.1 19.32/127.0 41.59/347.6 97.48/678.0 79.9/-",
    "CrossMAE 0.25, 12 blocks": "3.35/32.1 12.95/127.0 35.22/347.6 89.14/678.0 53.0/-",
    "CrossMAE 0.25, 8 blocks": "3.00/28.6 11.59/113.4 33.75/332.9 87.07/662.3 -/-",
    "CrossMAE 0.25, 1 block": "2.39/22.6 9.20/89.5 31.16/307.2 83.43/634.7 -/-",
    "classifier": "9.20/22.05 35.13/86.57 123.1/304.3 334.6/632.1 -/-",
}


def build(model: str, factory: str, size: int) -> torch.nn.Module:
    """The model on the meta device."""
    depth, kept = MODELS[model]
    with torch.device("meta"):
        if depth is None:
            return getattr(models_vit, f"vit_{factory}")(img_size=size)
        flags = dict(img_size=size, decoder_depth=depth, norm_pix_loss=True)
        if kept is None:
            return getattr(models_mae, f"mae_vit_{factory}")(**flags)
        flags |= dict(weight_fm=True, use_input=True)
        return getattr(models_cross, f"mae_vit_{factory}")(**flags)


def main() -> None:
    results = common.Results("cost", key=("model", "size"))
    for model in MODELS:
        for (name, (factory, size)), known in zip(SIZES.items(), KNOWN[model].split(), strict=True):
            if results.find(model=model, size=name) is not None:
                continue
            kept = MODELS[model][1]
            ratios = () if model == "classifier" else (0.75, kept or 0.75)
            gflop, params = common.count_cost(build(model, factory, size), size, ratios)
            known_gflop, known_params = (float(x) if x != "-" else None for x in known.split("/"))
            row = dict(model=model, size=name, gflop=round(gflop, 3), mparams=round(params, 2))
            row |= dict(known_gflop=known_gflop, known_mparams=known_params)
            results.add(**row)


if __name__ == "__main__":
    main()
