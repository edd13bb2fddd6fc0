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
BASE = "--model mae_vit_base_patch16"
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
    "ViT-B, batch 8": f"{BASE} --batch_size 8",
    "ViT-B, batch 8, kept 0.25": f"{BASE} --batch_size 8 --kept_mask_ratio 0.25",
    "ViT-L, batch 2": "--model mae_vit_large_patch16 --batch_size 2",
    "ViT-H/14, batch 1": "--model mae_vit_huge_patch14 --batch_size 1",
}
RANKS = {"digits, 1 process": 1, "digits, 2 processes": 2}
TRAIN = (
    f"main_pretrain.py {common.PRETRAIN} --norm_pix_loss {common.CROSS} --input_size 32 --epochs 3 "
    "--warmup_epochs 1"
)


def main(args) -> None:
    def measure_step(run: str) -> dict:
        """Images per second, GFLOP per image forward and backward, MiB of activations per image."""
        command = f"{STEP} {CHANGES[run]} {f'--device {args.device}' if args.device else ''}"
        found = json.loads(common.call(command, args.out / "speed.txt").splitlines()[-1])
        speed, gflop = round(found["images_per_s"], 2), round(found["gflop_per_image"], 2)
        mib = round(found["peak_memory_mib"] / found["batch_size"], 1)
        return dict(images_per_s=speed, gflop=gflop, mib=mib)

    def measure_training(run: str) -> dict:
        """Images per second of all ranks in the last of three epochs."""
        images = common.write_images("-m tools.demo_data", args.out / "digits")
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node={RANKS[run]}"
        command = f"{launcher} {TRAIN} --batch_size {32 // RANKS[run]}"
        printed = common.call(command, args.out / "speed.txt", data_path=images, output_dir="")
        speeds = re.findall(r"Epoch: \[\d+\] ([\d.]+) img/s", printed)
        return dict(images_per_s=float(speeds[-1]), gflop=None, mib=None)

    results = common.Results("speed", "run")
    results.measure(measure_step, [(run,) for run in CHANGES])
    results.measure(measure_training, [(run,) for run in RANKS])


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "out")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if available)")
    main(parser.parse_args())
