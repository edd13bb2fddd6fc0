"""The measures of tools.benchmark that need a pre-training model."""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.bench.measure import Timer, compare, count_flops, matmul_flops_per_s, peak_memory
from tools.bench.reference import reference_loss
from util.build import PRETRAIN_DEFAULTS, SHARED_DEFAULTS, build_pretrain_model
from util.casts import CastWeights
from util.io.checkpoint_file import write_checkpoint
from util.layers.attention import get_attention_backend
from util.layers.vit import compile_model
from util.lr_decay import param_groups_weight_decay
from util.optim import NativeScalerWithGradNormCount, autocast, build_adamw, choose_amp_dtype


def measure_step(args, device: torch.device, timer: Timer) -> dict:
    """Training step of pre-training on random images."""
    amp_dtype = choose_amp_dtype(args.amp, device)
    model = build_model(args, device)
    if args.compile:  # before build_losses: CastWeights looks for compiled blocks when it is made
        compile_model(model, args.compile)
    losses = build_losses(model, args, device, amp_dtype)
    loss, _ = losses
    compile_s = None
    if args.compile:
        compile_s = Timer(device, steps=1)(lambda: loss().backward())
        model.zero_grad(set_to_none=True)
    result = compare(*build_steps(model, losses, amp_dtype, device), timer, args.repeats)
    fill_gradients(model)  # so that peak memory counts activations only
    peaks = [peak_memory(lambda f=f: f().backward(), device) for f in losses]
    flops = None if args.compile else count_flops(lambda: loss().backward())
    result |= {
        "images_per_s": args.batch_size / result["seconds"],
        "images_per_s_reference": args.batch_size / result["seconds_reference"],
        "peak_memory_mib": peaks[0] / 2**20,
        "peak_memory_ratio": peaks[0] / peaks[1],
        "gflop_per_image": flops and flops / args.batch_size / 1e9,
        "compile_s": compile_s,
        "attention": model.blocks[0].attn.attention_backend.name,
    }
    if device.type == "cuda" and flops:
        matmul = matmul_flops_per_s(device, amp_dtype or torch.float32)
        result["matmul_tflop_per_s"] = matmul / 1e12
        result["share_of_matmul_rate"] = flops / result["seconds"] / matmul
    return result


def build_model(args, device: torch.device, **sizes) -> nn.Module:
    """The pre-training model that the flags describe; sizes without a flag may be given.

    Raises:
        UserError: the ratios leave no patch to see or to predict.
    """
    recipe = dict(cross_mae=not args.mae, weight_fm=True, use_input=True, norm_pix_loss=True)
    args = argparse.Namespace(**SHARED_DEFAULTS | PRETRAIN_DEFAULTS | vars(args) | recipe)
    amp_dtype = choose_amp_dtype(args.amp, device)
    attention = get_attention_backend(args.enable_flash_attention2, device, amp_dtype)
    return build_pretrain_model(args, attention, **sizes).to(device).train()


def build_losses(model: nn.Module, args, device: torch.device, amp_dtype: torch.dtype | None):
    """Two functions without arguments: the loss by the model, and by the reference."""
    imgs = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    noise = torch.rand(args.batch_size, model.patch_embed.num_patches, device=device)
    ratios = args.mask_ratio, args.kept_mask_ratio
    forward = CastWeights(model)

    def loss() -> Tensor:
        with autocast(device, amp_dtype):
            return forward(imgs, *ratios, noise=noise)

    def loss_by_reference() -> Tensor:
        with autocast(device, amp_dtype):
            return reference_loss(model, imgs, *ratios, noise)

    return loss, loss_by_reference


def build_adamws(model: nn.Module) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
    """The optimizer of the training scripts, and AdamW with PyTorch's defaults."""
    groups = param_groups_weight_decay(model, 0.05)
    adamw = build_adamw([dict(g) for g in groups], 1e-9, (0.9, 0.95))
    return adamw, torch.optim.AdamW([dict(g) for g in groups], lr=1e-9, betas=(0.9, 0.95))


def build_steps(model: nn.Module, losses, amp_dtype, device: torch.device):
    """Two functions without arguments: the training step, and the reference's."""
    loss, loss_by_reference = losses
    adamw, default_adamw = build_adamws(model)
    loss_scaler = NativeScalerWithGradNormCount(amp_dtype, device.type)
    grad_scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    params = [p for group in default_adamw.param_groups for p in group["params"]]

    def step() -> None:
        loss_scaler(loss(), adamw)
        adamw.zero_grad(set_to_none=True)

    def reference_step() -> None:
        value = loss_by_reference()
        value.item()
        grad_scaler.scale(value).backward()
        grad_scaler.unscale_(default_adamw)
        torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
        grad_scaler.step(default_adamw)
        grad_scaler.update()
        default_adamw.zero_grad(set_to_none=True)

    return step, reference_step


def fill_gradients(model: nn.Module) -> None:
    """Set every gradient to zero."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)


def measure_optimizer(args, device: torch.device, timer: Timer) -> dict:
    """Optimizer step of pre-training."""
    model = build_model(args, device)
    loss, _ = build_losses(model, args, device, choose_amp_dtype(args.amp, device))
    loss().backward()
    adamw, default_adamw = build_adamws(model)
    return compare(adamw.step, default_adamw.step, timer, args.repeats)


def measure_save(args, device: torch.device, timer: Timer) -> dict:
    """Writing model and optimizer, in the working folder because /tmp may be in memory."""
    model = build_model(args, device)
    adamw, _ = build_adamws(model)
    fill_gradients(model)
    adamw.step()
    checkpoint = {"model": model.state_dict(), "optimizer": adamw.state_dict()}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder, "checkpoint.pth")
        calls = (lambda: write_checkpoint(checkpoint, path)), (lambda: torch.save(checkpoint, path))
        result = compare(*calls, timer, args.repeats)
        return result | {"mib": path.stat().st_size / 2**20}
