"""Compare the speed, memory and FLOPs of this code with a reference, alternately in one process.

    python -m tools.benchmark --what step --model mae_vit_small_patch16 --batch_size 16

Both run in turn (A B A B ...), so that a drift of the machine's speed affects both. Printed are the
median of the paired ratios, the ratio of the fastest runs (above 1: this code is faster), and the
noise floor: the median of |ratio - 1| for the reference against itself. A ratio within the noise
floor shows no difference.

--what step       forward, backward and optimizer step of pre-training, against the reference
                  implementation in tools.reference with PyTorch's default AdamW
--what optimizer  the optimizer step alone, against PyTorch's default AdamW
--what loader     images per second of one process: --loader fast against --loader recipe, with the
                  same crops of JPEG files
--what eval       forward of the fine-tuned classifier, against timm's VisionTransformer
--what save       writing a checkpoint with optimizer state, against torch.save in place
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import models_vit
from tools.benchmark_step import (
    build_adamws,
    build_model,
    fill_gradients,
    measure_optimizer,
    measure_step,
)
from tools.measure import Timer, compare, count_flops, peak_memory
from tools.timm_model import to_timm
from util.build import find_factory
from util.data.image_io import open_image, read_image
from util.data.sources import find_images
from util.data.transforms import FastPretrainTransform, build_pretrain_transform, normalize
from util.distributed import choose_device
from util.io.checkpoint_file import write_checkpoint
from util.io.errors import UserError
from util.layers.attention import get_attention_backend
from util.optim import autocast, choose_amp_dtype
from util.rng import seeded
from util.run.launch import launch


def measure_loader(args, device: torch.device, timer: Timer) -> dict:
    """Reading and transforming all of --images in one process."""
    args.mean, args.std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    fast, recipe = FastPretrainTransform(args.input_size), build_pretrain_transform(args)
    with tempfile.TemporaryDirectory() as folder:
        paths = list(find_images(Path(args.images or write_photographs(Path(folder)))))
        if not paths:
            raise UserError(f"There is no image in {args.images}; name a folder of JPEG files.")

        def load(read, transform) -> list[Tensor]:
            imgs = []
            for index, path in enumerate(paths):
                with seeded(0, 0, index):
                    imgs.append(transform(read(path)))
            return imgs

        calls = (lambda: load(read_image, fast)), (lambda: load(open_image, recipe))
        result = compare(*calls, timer, args.repeats)
        uint8, expected = (torch.stack(call()) for call in calls)
    mean, std = (
        torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    difference = (normalize(uint8, mean, std) - expected) * std * 255
    return result | {
        "images_per_s": len(paths) / result["seconds"],
        "images_per_s_textbook": len(paths) / result["seconds_textbook"],
        "mean_grey_level_difference": difference.abs().mean().item(),
    }


def write_photographs(folder: Path) -> Path:
    """Write 8 JPEG files of a typical ImageNet size, 500x375, cut from scikit-learn's photographs.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise UserError(
            "Without --images FOLDER the photographs of scikit-learn are used: install it with "
            "`pip install -r scripts/requirements-demo.txt`."
        ) from error
    for index, photograph in enumerate(load_sample_images().images):  # each 427x640
        for corner, (top, left) in enumerate([(0, 0), (0, 140), (52, 0), (52, 140)]):
            crop = Image.fromarray(photograph[top : top + 375, left : left + 500])
            crop.save(folder / f"{index}_{corner}.jpg", quality=92)
    return folder


def measure_eval(args, device: torch.device, timer: Timer) -> dict:
    """Classifier forward, against timm with the same weights."""
    amp_dtype = choose_amp_dtype(args.amp, device)
    model = find_factory(models_vit, "vit_", args.model.removeprefix("mae_"))(
        img_size=args.input_size,
        global_pool=True,
        attention_backend=get_attention_backend(args.enable_flash_attention2, device, amp_dtype),
    )
    timm_model, *_ = to_timm(model)
    imgs = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    models = [m.to(device).eval() for m in (model, timm_model)]

    def forward(model: nn.Module) -> None:
        with torch.inference_mode(), autocast(device, amp_dtype):
            model(imgs)

    calls = [lambda m=m: forward(m) for m in models]
    result = compare(*calls, timer, args.repeats)
    peaks = [peak_memory(call, device) for call in calls]
    return result | {
        "images_per_s": args.batch_size / result["seconds"],
        "peak_memory_ratio": peaks[0] / peaks[1],
        "gflop_per_image": count_flops(calls[0]) / args.batch_size / 1e9,
    }


def measure_save(args, device: torch.device, timer: Timer) -> dict:
    """Writing model and optimizer, in the working folder because /tmp may be in memory."""
    model = build_model(args, device)
    adamw, _ = build_adamws(model)
    fill_gradients(model)
    adamw.step()
    checkpoint = {"model": model.state_dict(), "optimizer": adamw.state_dict()}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder, "checkpoint.pth")
        result = compare(
            lambda: write_checkpoint(checkpoint, path),
            lambda: torch.save(checkpoint, path),
            timer,
            args.repeats,
        )
        return result | {"mib": path.stat().st_size / 2**20}


MEASURES = {
    "step": measure_step,
    "optimizer": measure_optimizer,
    "loader": measure_loader,
    "eval": measure_eval,
    "save": measure_save,
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--what", choices=list(MEASURES), default="step", help="see above (default: step)")
    add(
        "--model",
        default="mae_vit_small_patch16",
        help="vit_* for --what eval (default: %(default)s)",
    )
    add("--mae", action="store_true", help="the MAE baseline instead of CrossMAE")
    add("--input_size", type=int, default=224, help="pixels (default: 224)")
    add("--batch_size", type=int, default=16, help="images (default: 16)")
    add("--decoder_depth", type=int, default=12, help="blocks (default: 12)")
    add("--mask_ratio", type=float, default=0.75, help="(default: 0.75)")
    add("--kept_mask_ratio", type=float, default=0.75, help="(default: 0.75)")
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    amp_types = ["auto", "bf16", "fp16", "off"]
    add("--amp", choices=amp_types, default="auto", help="autocast type (default: auto)")
    add("--enable_flash_attention2", action="store_true", help="not in the reference")
    add("--grad_checkpointing", action="store_true", help="not in the reference")
    add("--compile", action="store_true", help="compile the blocks; not in the reference")
    add("--repeats", type=int, default=7, help="pairs measured (default: 7)")
    add("--steps", type=int, default=1, help="per timing; GPU: 20 or more (default: 1)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    clock_help = "cpu: processor seconds, for a shared machine with --threads 1 (default: wall)"
    add("--clock", choices=["wall", "cpu"], default="wall", help=clock_help)
    add("--images", help="JPEG files for --what loader (default: photographs of scikit-learn)")
    add("--json", action="store_true", help="one JSON object on the last line")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure, print a table, and with --json one object on the last line.

    Raises:
        UserError: a flag is out of its range, or as the measures say.
    """
    if args.compile and args.what != "step":
        raise UserError(f"--compile is measured by --what step, not by --what {args.what}.")
    for name in ("repeats", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be 1 or more.")
    device = choose_device(args.device, 0)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    is_gpu = device.type == "cuda"
    names = ("what", "model", "batch_size", "kept_mask_ratio", "amp", "compile")
    result = {name: getattr(args, name) for name in names} | {
        "machine": torch.cuda.get_device_name(device) if is_gpu else str(device),
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "images_per_s": None,
        "peak_memory_ratio": None,
    }
    result |= MEASURES[args.what](args, device, Timer(device, args.steps, args.clock))
    for name, value in result.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
