"""Speed and memory of a pre-training step on this machine, by model and input size.

    python scripts/experiments/speed.py [--device cuda]

Each row changes one setting of ViT-S, 224 pixels, batch 16, kept mask ratio 0.75, 12 decoder
blocks, float32, one thread. Run it on an otherwise idle machine. The last two rows are training
runs of the small model on digits with one and two ranks, including data loading.
"""

import json
import re

import common

STEP = "-m tools.benchmark --what step --repeats 3 --threads 1 --amp off --json"
CHANGES = {
    "ViT-S": "",
    "batch 4": "--batch_size 4",
    "batch 8": "--batch_size 8",
    "112 pixels": "--input_size 112",
    "320 pixels": "--input_size 320",
    "kept 0.5": "--kept_mask_ratio 0.5",
    "kept 0.25": "--kept_mask_ratio 0.25",
    "decoder 4": "--decoder_depth 4",
    "MAE, decoder 8": "--mae --decoder_depth 8",
    "grad_checkpointing": "--grad_checkpointing",
    "ViT-B, batch 8": "--model mae_vit_base_patch16 --batch_size 8",
    "ViT-B, batch 8, kept 0.25": "--model mae_vit_base_patch16 --batch_size 8 "
    "--kept_mask_ratio 0.25",
    "ViT-L, batch 2": "--model mae_vit_large_patch16 --batch_size 2",
    "ViT-H/14, batch 1": "--model mae_vit_huge_patch14 --batch_size 1",
}
RANKS = {"digits, 1 process": 1, "digits, 2 processes": 2}
RUNS = [*CHANGES, *RANKS]
TRAIN = f"main_pretrain.py {common.PRETRAIN} {common.CROSS} --decoder_depth 4 --input_size 32"


def measure_step(flags: str, args) -> dict:
    """Images per second, GFLOP per image forward and backward, MiB of activations per image."""
    device = f"--device {args.device}" if args.device else ""
    printed, _ = common.call(f"{STEP} {flags} {device}", args.out / "speed.txt")
    found = json.loads(printed.splitlines()[-1])
    return dict(
        images_per_s=round(found["images_per_s"], 2),
        gflop=round(found["gflop_per_image"], 2),
        mib=round(found["peak_memory_mib"] / found["batch_size"], 1),
    )


def measure_training(num_ranks: int, args) -> dict:
    """Images per second of all ranks in the last of three epochs."""
    images = common.write_images("-m tools.demo_data", args.out / "digits")
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={num_ranks}"
    batch = f"--batch_size {32 // num_ranks} --epochs 3 --warmup_epochs 1"
    printed, _ = common.call(
        f"{launcher} {TRAIN} {batch} --data_path {common.quote(images)} --output_dir ''",
        args.out / "speed.txt",
    )
    speeds = re.findall(r"Epoch: \[\d+\] ([\d.]+) img/s", printed)
    return dict(images_per_s=float(speeds[-1]), gflop=None, mib=None)


def main(args) -> None:
    results = common.Results("speed", key=("run",))
    for run, flags in CHANGES.items():
        if results.find(run=run) is None:
            results.add(run=run, **measure_step(flags, args))
    for run, num_ranks in RANKS.items():
        if results.find(run=run) is None:
            results.add(run=run, **measure_training(num_ranks, args))


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    main(parser.parse_args())
