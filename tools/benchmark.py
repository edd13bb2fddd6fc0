"""Measure ours against the textbook form, side by side in one process: speed, memory, FLOPs.

    python -m tools.benchmark --what step --model mae_vit_small_patch16 --batch_size 16

Both forms run in turn (A B A B ...), so that a machine whose speed drifts drifts for both. Printed
are the median of the paired ratios and the ratio of the fastest runs (above 1: ours is faster), and
the noise floor: how far the same ratio of the textbook form against itself lies from 1, in the
median. A ratio inside the noise floor shows nothing.

--what step       forward, backward and update of a pre-training step, against tools.reference with
                  PyTorch's default AdamW
--what optimizer  the update alone
--what loader     images per second of one loader process: the uint8 chain against the recipe's
                  chain, with the same crops, on JPEG files
--what eval       forward of the fine-tuned classifier, against timm's VisionTransformer
--what save       writing a checkpoint with optimizer state, against torch.save in place
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn

import models_cross
import models_mae
import models_vit
from tools.measure import Clock, compare, count_flops, matmul_rate, peak_memory
from tools.reference import reference_loss
from util.build import find_factory
from util.data.image_io import open_image, read_image
from util.data.sources import find_images
from util.data.transforms import FastPretrainTransform, build_pretrain_transform, normalize
from util.distributed import choose_device
from util.io.checkpoint_file import write_checkpoint
from util.io.errors import UserError
from util.layers.attention import get_attention_backend
from util.layers.compile import compile_blocks
from util.layers.masking import num_visible_and_predicted
from util.lr_decay import param_groups_weight_decay
from util.optim import (
    NativeScalerWithGradNormCount,
    autocast,
    build_adamw,
    choose_amp_dtype,
)
from util.rng import seeded
from util.run import launch as run
from util.run.flags import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)


def get_args_parser() -> argparse.ArgumentParser:
    """Flags of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--what",
        choices=["step", "optimizer", "loader", "eval", "save"],
        default="step",
        help="see above (default: step)",
    )
    parser.add_argument(
        "--model",
        default="mae_vit_small_patch16",
        help="vit_* for --what eval (default: %(default)s)",
    )
    parser.add_argument("--mae", action="store_true", help="the MAE baseline instead of CrossMAE")
    parser.add_argument("--input_size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batch_size", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--decoder_depth", type=int, default=12, help="blocks (default: 12)")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="(default: 0.75)")
    parser.add_argument("--kept_mask_ratio", type=float, default=0.75, help="(default: 0.75)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="autocast type (default: auto)",
    )
    parser.add_argument("--enable_flash_attention2", action="store_true", help="in ours")
    parser.add_argument("--grad_checkpointing", action="store_true", help="in ours")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    parser.add_argument("--repeats", type=int, default=7, help="pairs measured (default: 7)")
    parser.add_argument(
        "--steps", type=int, default=1, help="per timing; GPU: 20 or more (default: 1)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor seconds, for a shared machine with --threads 1 (default: wall)",
    )
    parser.add_argument(
        "--images", help="JPEG files for --what loader (default: photographs of scikit-learn)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    return parser


def build_model(args, attention_backend) -> nn.Module:
    """The pre-training model that is measured."""
    module = models_mae if args.mae else models_cross
    options = {} if args.mae else dict(weight_fm=True, use_input=True)
    return find_factory(module, "mae_vit_", args.model)(
        img_size=args.input_size,
        decoder_depth=args.decoder_depth,
        norm_pix_loss=True,
        attention_backend=attention_backend,
        **options,
    )


def measure_step(args, device: torch.device, clock: Clock) -> dict:
    """Pre-training step on random pictures."""
    amp_dtype = choose_amp_dtype(args.amp, device)
    model = build_model(
        args, get_attention_backend(args.enable_flash_attention2, device, amp_dtype)
    )
    model.to(device).train()
    model.grad_checkpointing = args.grad_checkpointing
    compiled_in = compile_blocks_of(model, args, device)
    size = args.input_size
    imgs = torch.randn(args.batch_size, 3, size, size, device=device)
    noise = torch.rand(args.batch_size, model.patch_embed.num_patches, device=device)
    ratios = args.mask_ratio, args.kept_mask_ratio
    num_visible_and_predicted(noise.shape[1], *ratios)

    def our_loss() -> Tensor:
        with autocast(device, amp_dtype):
            return model(imgs, *ratios, noise=noise)

    def textbook() -> Tensor:
        with autocast(device, amp_dtype):
            return reference_loss(model, imgs, *ratios, noise)

    groups = param_groups_weight_decay(model, 0.05)
    our_adamw = build_adamw([dict(g) for g in groups], 1e-9, (0.9, 0.95))
    plain_adamw = torch.optim.AdamW([dict(g) for g in groups], lr=1e-9, betas=(0.9, 0.95))
    scaler = NativeScalerWithGradNormCount(amp_dtype, device.type)
    plain_scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)

    def our_step() -> None:
        scaler(our_loss(), our_adamw)
        our_adamw.zero_grad(set_to_none=True)

    def textbook_step() -> None:
        loss = textbook()
        loss.item()
        plain_scaler.scale(loss).backward()
        plain_scaler.unscale_(plain_adamw)
        norms = [p.grad.norm() for g in groups for p in g["params"] if p.grad is not None]
        torch.stack(norms).norm()
        plain_scaler.step(plain_adamw)
        plain_scaler.update()
        plain_adamw.zero_grad(set_to_none=True)

    if args.what == "optimizer":
        our_loss().backward()
        return compare(our_adamw.step, plain_adamw.step, clock, args.repeats)
    result = compare(our_step, textbook_step, clock, args.repeats)
    for p in model.parameters():  # so that gradients are not counted as activations
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    peaks = [peak_memory(lambda f=f: f().backward(), device) for f in (our_loss, textbook)]
    flops = count_flops(lambda: our_loss().backward()) if not args.compile else None
    result |= {
        "images_per_s": args.batch_size / result["seconds"],
        "images_per_s_textbook": args.batch_size / result["seconds_textbook"],
        "peak_memory_mib": peaks[0] / 2**20,
        "peak_memory_ratio": peaks[0] / peaks[1],
        "gflop_per_image": flops and flops / args.batch_size / 1e9,
        "compile_s": compiled_in,
    }
    if device.type == "cuda" and flops:
        rate = matmul_rate(device, amp_dtype or torch.float32)
        result["matmul_tflop_per_s"] = rate / 1e12
        result["share_of_matmul_rate"] = flops / result["seconds"] / rate
    return result


def compile_blocks_of(model: nn.Module, args, device: torch.device) -> float | None:
    """Compile the blocks if asked to; returns the seconds that the first step then takes."""
    if not args.compile:
        return None
    compile_blocks(model)
    start = time.perf_counter()
    size = args.input_size
    with autocast(device, choose_amp_dtype(args.amp, device)):
        imgs = torch.randn(args.batch_size, 3, size, size, device=device)
        model(imgs, args.mask_ratio, args.kept_mask_ratio).backward()
    Clock(device, 1).wait()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def measure_loader(args, device: torch.device, clock: Clock) -> dict:
    """One process reading --images once per call, with the same crops in both chains."""
    with tempfile.TemporaryDirectory() as folder:
        paths = list(find_images(Path(args.images or cut_photographs(Path(folder)))))
        if not paths:
            raise UserError(f"There is no picture in {args.images}; name a folder of JPEG files.")
        return compare_chains(args, paths, clock)


def cut_photographs(folder: Path) -> Path:
    """Write 8 JPEG files of ImageNet's usual size, 500x375, cut from scikit-learn's photographs."""
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise UserError(
            "Without --images FOLDER the photographs of scikit-learn are used: install it with "
            "`pip install -r scripts/requirements-demo.txt`."
        ) from error
    for number, photograph in enumerate(load_sample_images().images):  # each 427x640
        for corner, (top, left) in enumerate([(0, 0), (0, 140), (52, 0), (52, 140)]):
            cut = Image.fromarray(photograph[top : top + 375, left : left + 500])
            cut.save(folder / f"{number}_{corner}.jpg", quality=92)
    return folder


def compare_chains(args, paths: list[str], clock: Clock) -> dict:
    """The uint8 chain against the recipe's, on the same files with the same crops."""
    args.mean, args.std = IMAGENET_MEAN, IMAGENET_STD
    fast, recipe = FastPretrainTransform(args.input_size), build_pretrain_transform(args)

    def read_all(read, transform) -> list[Tensor]:
        out = []
        for i, path in enumerate(paths):
            with seeded(0, 0, i):
                out.append(transform(read(path)))
        return out

    result = compare(
        lambda: read_all(read_image, fast),
        lambda: read_all(open_image, recipe),
        clock,
        args.repeats,
    )
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    ours = normalize(torch.stack(read_all(read_image, fast)), mean, std)
    difference = (ours - torch.stack(read_all(open_image, recipe))) * std * 255
    return result | {
        "images_per_s": len(paths) / result["seconds"],
        "images_per_s_textbook": len(paths) / result["seconds_textbook"],
        "mean_grey_level_difference": difference.abs().mean().item(),
    }


def measure_eval(args, device: torch.device, clock: Clock) -> dict:
    """Classifier forward against timm's, on the same weights."""
    name = args.model.removeprefix("mae_")
    amp_dtype = choose_amp_dtype(args.amp, device)
    attention_backend = get_attention_backend(args.enable_flash_attention2, device, amp_dtype)
    ours = find_factory(models_vit, "vit_", name)(
        img_size=args.input_size, global_pool=True, attention_backend=attention_backend
    )
    stock = timm.models.VisionTransformer(
        img_size=args.input_size,
        patch_size=ours.patch_embed.patch_size,
        embed_dim=ours.embed_dim,
        depth=len(ours.blocks),
        num_heads=ours.blocks[0].attn.num_heads,
        global_pool="avg",
    )
    stock.load_state_dict(ours.state_dict())
    imgs = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    models = [m.to(device).eval() for m in (ours, stock)]

    def forward(model: nn.Module) -> None:
        with torch.inference_mode(), autocast(device, amp_dtype):
            model(imgs)

    calls = [lambda m=m: forward(m) for m in models]
    result = compare(*calls, clock, args.repeats)
    peaks = [peak_memory(call, device) for call in calls]
    return result | {
        "images_per_s": args.batch_size / result["seconds"],
        "peak_memory_ratio": peaks[0] / peaks[1],
        "gflop_per_image": count_flops(calls[0]) / args.batch_size / 1e9,
    }


def measure_save(args, device: torch.device, clock: Clock) -> dict:
    """Seconds to write model and optimizer, in the working folder: /tmp may be memory."""
    model = build_model(args, None).to(device)
    optimizer = build_adamw(param_groups_weight_decay(model, 0.05), 1e-4, (0.9, 0.95))
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder, "checkpoint.pth")
        result = compare(
            lambda: write_checkpoint(checkpoint, path),
            lambda: torch.save(checkpoint, path),
            clock,
            args.repeats,
        )
        return result | {"mib": path.stat().st_size / 2**20}


def main(args) -> dict:
    """Measure, print a table, and with --json one object on the last line."""
    if args.compile and args.what != "step":
        raise UserError(f"--compile is measured by --what step, not by --what {args.what}.")
    for name in ("repeats", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be 1 or more.")
    device = choose_device(args.device, 0)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = Clock(device, args.steps, args.clock)
    measure = {
        "loader": measure_loader,
        "eval": measure_eval,
        "save": measure_save,
    }.get(args.what, measure_step)
    machine = str(device)
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    result = {
        "what": args.what,
        "model": args.model,
        "batch_size": args.batch_size,
        "kept_mask_ratio": args.kept_mask_ratio,
        "amp": args.amp,
        "compile": args.compile,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "images_per_s": None,
        "peak_memory_ratio": None,
    } | measure(args, device, clock)
    for name, value in result.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if args.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    run.run(main, get_args_parser().parse_args())
