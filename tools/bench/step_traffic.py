"""Memory traffic and host time of a training step, for a GPU but without one.

Tensors have no data and are on the CPU, with the rule of CUDA's autocast that LayerNorm works in
float32.
"""

import argparse

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from tools.bench.compiled import compile_counted
from tools.bench.measure import Timer, compare
from tools.bench.step import build_losses, build_model
from tools.bench.traffic import LikeCuda, Traffic
from util.io.errors import UserError
from util.layers.masking import num_visible_and_predicted
from util.layers.vit import compile_model

CPU = torch.device("cpu")
# Dense matrix products and memory as the vendors state them: TFLOP/s of bfloat16 (float32 sums)
# and of TF32, TB/s
GPUS = {
    "RTX 4090": (165, 82.6, 1.008),
    "A100 80GB": (312, 156, 2.039),
    "H100 SXM": (989, 494, 3.35),
    "H200": (989, 494, 4.8),
}


def measure_traffic(args, device: torch.device, timer: Timer) -> dict:
    """Forward and backward of pre-training by this code and by the reference implementation.

    Raises:
        UserError: the ratios leave no patch to see or to predict.
    """
    if args.grad_checkpointing:
        raise UserError("--what traffic does not count --grad_checkpointing; leave it out.")
    # auto: what a GPU would choose
    amp_dtype = {"off": None, "fp16": torch.float16}.get(args.amp, torch.bfloat16)
    ours = count_step(args, amp_dtype)
    reference = count_step(args, amp_dtype, by_reference=True)
    result = {"amp": args.amp.replace("auto", "bf16"), "recompute": args.recompute}
    for name, traffic in (("", ours), ("_reference", reference)):
        result |= {
            f"kernels{name}": traffic.kernels,
            f"gb_outside_matmul{name}": traffic.other_bytes / 1e9,
            f"gb_in_matmul{name}": traffic.matmul_bytes / 1e9,
            f"gb_kept{name}": traffic.kept_bytes / 1e9,
        }
    result["ratio_outside_matmul"] = ours.other_bytes / reference.other_bytes
    result["ratio_kept"] = ours.kept_bytes / reference.kept_bytes
    result |= {f"gb_{name}": num / 1e9 for name, num in ours.bytes.most_common(6)}
    for name, (bf16, tf32, bandwidth) in GPUS.items():
        rates = (bf16 if amp_dtype else tf32) * 1e12, bandwidth * 1e12
        seconds = ours.seconds(*rates)
        result[f"estimate: images/s, {name}"] = args.batch_size / seconds
        result[f"estimate: ratio, {name}"] = reference.seconds(*rates) / seconds
    return result | measure_host(args, amp_dtype, timer)


def count_step(args, amp_dtype: torch.dtype | None, by_reference: bool = False) -> Traffic:
    """Traffic of forward and backward, by the model or by the reference implementation."""
    with torch.device("meta"):
        model = build_model(args, torch.device("meta"))
    num_patches = model.patch_embed.num_patches
    _, num_predicted = num_visible_and_predicted(
        num_patches, args.mask_ratio, args.mask_ratio if args.mae else args.kept_mask_ratio
    )
    with FakeTensorMode(), Traffic() as traffic, LikeCuda(args.batch_size * num_predicted):
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))
        if args.compile and not by_reference:
            compile_counted(model, args.compile, traffic)
        loss, loss_by_reference = build_losses(model, args, CPU, amp_dtype)
        traffic.reset([*model.parameters(), *model.buffers()])
        with saved_tensors_hooks(traffic.keep, lambda x: x):
            value = loss_by_reference() if by_reference else loss()
        traffic.release()
        value.backward()
    return traffic


def measure_host(args, amp_dtype: torch.dtype | None, timer: Timer) -> dict[str, float]:
    """Milliseconds of the step at width 16 with one image, where the host is all that counts."""
    args = argparse.Namespace(**vars(args) | dict(batch_size=1, amp="off"))  # amp_dtype counts
    narrow = dict(embed_dim=16, num_heads=1, decoder_embed_dim=16, decoder_num_heads=1)
    model = build_model(args, CPU, **narrow)
    if args.compile:
        compile_model(model, args.compile)
    calls = [
        lambda loss=loss: loss().backward() for loss in build_losses(model, args, CPU, amp_dtype)
    ]
    result = compare(*calls, timer, args.repeats)
    return {
        "host_ms": result["seconds"] * 1e3,
        "host_ms_reference": result["seconds_reference"] * 1e3,
        "host_ratio": result["ratio_median"],
        "noise_floor": result["noise_floor"],
    }
