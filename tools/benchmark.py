"""Compare the speed, memory and FLOPs of this code with a reference, alternately in one process.

    python -m tools.benchmark --what step --model mae_vit_small_patch16 --batch_size 16

Printed are the median of the paired ratios, the ratio of the fastest runs (above 1: this code is
faster), and the noise floor: the median of |ratio - 1| for the reference against itself. A ratio
within the noise floor shows no difference.

--what step       forward, backward and optimizer step of pre-training, against the reference
                  implementation in tools.bench.reference with PyTorch's default AdamW
--what optimizer  the optimizer step alone, against PyTorch's default AdamW
--what loader     images per second of one process: --loader fast against --loader pillow, with the
                  same crops of JPEG files; then every installed JPEG decoder alone
--what eval       forward of the fine-tuned classifier, against timm's VisionTransformer
--what traffic    kernels, bytes moved and bytes kept for backward by forward and backward of
                  pre-training, counted without data for a GPU (bf16 unless --amp says otherwise;
                  with --compile as Inductor plans it), against the reference implementation; the
                  speed that these allow at the rates that the vendors state, an estimate; and the
                  host's time for the same step with almost no data, measured
--what save       writing a checkpoint with optimizer state, against torch.save in place
"""

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

import models_vit
from tools.bench.measure import Timer, compare, count_flops, peak_memory
from tools.bench.step import measure_optimizer, measure_save, measure_step
from tools.bench.step_traffic import measure_traffic
from tools.formats.timm_model import to_timm
from util.build import find_factory
from util.data.image_io import open_image, read_image
from util.data.jpeg import DECODERS
from util.data.sources import find_images
from util.data.transforms import FastPretrainTransform, build_pretrain_transform, normalize
from util.distributed import choose_device
from util.io.errors import UserError
from util.layers.attention import get_attention_backend
from util.optim import autocast, choose_amp_dtype
from util.rng import seeded
from util.run.checks import check_memory, check_ranges
from util.run.flags import FlagParser, add_flag
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
        result |= measure_decoders(paths, timer, args.repeats)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (args.mean, args.std))
    difference = (normalize(uint8, mean, std) - expected) * std * 255
    return result | {
        "images_per_s": len(paths) / result["seconds"],
        "images_per_s_reference": len(paths) / result["seconds_reference"],
        "mean_grey_level_difference": difference.abs().mean().item(),
    }


def measure_decoders(paths: list[str], timer: Timer, repeats: int) -> dict[str, float]:
    """JPEG files decoded per second by each installed decoder, timed alternately."""
    paths = [path for path in paths if path.lower().endswith((".jpg", ".jpeg"))]
    files = [bytearray(Path(path).read_bytes()) for path in paths]
    tensors = [torch.frombuffer(data, dtype=torch.uint8) for data in files]
    calls = {
        name: lambda decode=decode: [decode(data, 3) for data in tensors]
        for name, decode in DECODERS.items()
    }
    calls["pillow"] = lambda: [
        pil_to_tensor(Image.open(BytesIO(data)).convert("RGB")) for data in files
    ]
    times = [{name: timer(call) for name, call in calls.items()} for _ in range(repeats + 1)][1:]
    return {
        f"decoded_per_s_{name}": len(paths) / statistics.median(time[name] for time in times)
        for name in calls
    }


def write_photographs(folder: Path) -> Path:
    """Write 8 JPEG files of a typical ImageNet size, 500x375: crops of scikit-learn's images."""
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


MEASURES = {
    "step": measure_step,
    "optimizer": measure_optimizer,
    "loader": measure_loader,
    "eval": measure_eval,
    "save": measure_save,
    "traffic": measure_traffic,
}


def get_args_parser() -> FlagParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = FlagParser("python -m tools.benchmark", description=__doc__, formatter_class=layout)
    flag = partial(add_flag, parser)
    flag("--what", str, "step", "see above", choices=list(MEASURES))
    flag("--model", str, "mae_vit_small_patch16", "vit_* for --what eval")
    flag("--mae", bool, False, "the MAE baseline instead of CrossMAE")
    flag("--input_size", int, 224, "pixels")
    flag("--batch_size", int, 16, "images")
    flag("--decoder_depth", int, 12, "blocks")
    flag("--mask_ratio", float, 0.75, "fraction of patches that is masked")
    flag("--kept_mask_ratio", float, 0.75, "CrossMAE: fraction of patches that is predicted")
    flag("--device", str, None, "cuda or cpu (default: cuda if available)")
    amp_types = ["auto", "bf16", "fp16", "off"]
    flag("--amp", str, "auto", "autocast dtype", choices=amp_types)
    flag("--enable_flash_attention2", bool, False, "not in the reference")
    flag("--grad_checkpointing", bool, False, "not in the reference")
    text = "operations computed again in backward"
    flag("--recompute", str, "none", text, choices=["none", "gelu", "all"])
    options = dict(nargs="?", const="blocks", choices=["blocks", "whole"])
    flag("--compile", str, None, "blocks or whole model; not in the reference", **options)
    flag("--repeats", int, 7, "pairs measured")
    flag("--steps", int, 1, "calls per timing; GPU: 20 or more")
    flag("--threads", int, None, "CPU threads (default: torch's)")
    text = "cpu: processor time, for a shared machine with --threads 1"
    flag("--clock", str, "wall", text, choices=["wall", "cpu"])
    text = "JPEG files for --what loader (default: photographs of scikit-learn)"
    flag("--images", str, None, text)
    flag("--json", bool, False, "one JSON object on the last line")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.compile and args.what not in ("step", "traffic"):
        raise UserError(f"--compile is for --what step and traffic, not for {args.what}.")
    counts = ("repeats", "steps", "batch_size", "threads", "input_size", "decoder_depth")
    check_ranges(args, dict.fromkeys(counts, "[1, inf)"))
    check_memory(args)
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
