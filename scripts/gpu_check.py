"""One group of the checks of gpu_check.sh: python scripts/gpu_check.py GROUP RESULTS_FILE."""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_cross  # noqa: E402
import models_vit  # noqa: E402
from tools import benchmark  # noqa: E402
from tools.bench.reference import reference_loss  # noqa: E402
from tools.bench.step import build_losses, build_model, build_steps  # noqa: E402
from util.casts import CastWeights  # noqa: E402
from util.data.loaders import DeviceLoader  # noqa: E402
from util.distributed import sync_gradients  # noqa: E402
from util.layers.vit import compile_model  # noqa: E402
from util.optim import NativeScalerWithGradNormCount, autocast, build_adamw  # noqa: E402

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if IS_GPU else torch.device("cpu")
TINY = "--model mae_vit_mini_patch4 --input_size 32 --decoder_depth 2 --batch_size 4 --repeats 1"
STEP = "--steps 10 --repeats 3 --model mae_vit_{}_patch16 --batch_size {} --kept_mask_ratio {} {}"
ROWS = {  # the flags of tools.benchmark
    "base": [
        *(STEP.format("base", 256, 0.25, f"--recompute {x}") for x in ("none", "gelu", "all")),
        STEP.format("base", 256, 0.25, "--enable_flash_attention2"),
        STEP.format("base", 64, 0.25, ""),
        STEP.format("base", 1024, 0.25, ""),
        STEP.format("base", 256, 0.75, ""),
    ],
    "compiled": [
        STEP.format("base", 256, 0.25, "--compile blocks"),
        STEP.format("base", 256, 0.25, "--compile whole"),
        STEP.format("base", 1024, 0.25, "--compile blocks"),
    ],
    "sizes": [
        STEP.format("small", 512, 0.75, ""),
        STEP.format("large", 256, 0.75, ""),
        STEP.format("small", 512, 0.75, "--compile blocks"),
        "--what eval --model vit_base_patch16 --batch_size 256 --steps 10 --repeats 3",
    ],
    "loader": ["--what loader --repeats 3"],
}
TINY_ROWS = {
    "base": [f"{TINY} --recompute {x}" for x in ("none", "gelu", "all")],
    "compiled": [f"{TINY} --mae"],  # compiling on a CPU takes minutes: the tests do it
    "sizes": ["--what eval --model vit_mini_patch4 --input_size 32 --batch_size 4 --repeats 1"],
    "loader": [],
}


def measure(row: str, results: Path) -> None:
    """One row of tools.benchmark; its JSON goes to the end of the file."""
    print(f"-- {row}", flush=True)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        benchmark.main(benchmark.get_args_parser().parse_args([*row.split(), "--json"]))
    *table, line = text.getvalue().splitlines()
    print("\n".join(table), flush=True)
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps({"flags": row} | json.loads(line)) + "\n")


def tiny(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    build = partial(models_cross.mae_vit_mini_patch4, decoder_depth=2, norm_pix_loss=True)
    return build(img_size=32, weight_fm=True, use_input=True, **options).to(DEVICE)


def check_loss(amp_dtype, policy="none", compiled="", tolerance=2e-2) -> None:
    """Loss near that of the reference in float32; three steps lower it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model, imgs = tiny(), torch.randn(16, 3, 32, 32, device=DEVICE)
    noise = torch.rand(16, 64, device=DEVICE)
    expected = reference_loss(model, imgs, 0.75, 0.25, noise).item()
    model.set_recompute(policy)
    if compiled:
        compile_model(model, compiled)
    scaler = NativeScalerWithGradNormCount(amp_dtype, DEVICE.type)
    optimizer = build_adamw([p for p in model.parameters() if p.requires_grad], 1e-3, (0.9, 0.95))
    forward, losses = CastWeights(model), []
    for _ in range(4):
        with autocast(DEVICE, amp_dtype):
            loss = forward(imgs, 0.75, 0.25, noise=noise)
        scaler(loss, optimizer)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert abs(losses[0] - expected) < (tolerance if amp_dtype else 1e-4), (losses[0], expected)
    assert losses[-1] < losses[0], losses
    again = build_adamw([p for p in model.parameters() if p.requires_grad], 1e-3, (0.9, 0.95))
    again.load_state_dict(optimizer.state_dict())  # as a resumed run does
    again.step()


def check_ddp(compiled: str) -> None:
    """Two accumulated halves on one rank of a process group equal one whole batch."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    dist.init_process_group("nccl" if IS_GPU else "gloo", rank=0, world_size=1)
    try:
        model, imgs = tiny(), torch.randn(8, 3, 32, 32, device=DEVICE)
        noise = torch.rand(8, 64, device=DEVICE)
        model(imgs, noise=noise).backward()
        expected = model.decoder_pred.weight.grad.clone()
        model.zero_grad(set_to_none=True)
        if compiled:
            compile_model(model, compiled)
        ddp_model = DistributedDataParallel(model)
        for i in range(2):
            with sync_gradients(ddp_model, i == 1):
                half = slice(4 * i, 4 * i + 4)
                (ddp_model(imgs[half], noise=noise[half]) / 2).backward()
        torch.testing.assert_close(model.decoder_pred.weight.grad, expected, rtol=1e-3, atol=1e-5)
    finally:
        dist.destroy_process_group()


def check_classifier() -> None:
    """A fine-tuning step with stochastic depth, and an evaluation."""
    model = models_vit.vit_mini_patch4(img_size=32, num_classes=5, drop_path_rate=0.2).to(DEVICE)
    imgs = torch.randn(8, 3, 32, 32, device=DEVICE)
    with autocast(DEVICE, torch.bfloat16):
        loss = model.train()(imgs).float().square().mean()
    loss.backward()
    with torch.inference_mode(), autocast(DEVICE, torch.bfloat16):
        assert model.eval()(imgs).isfinite().all()


def check_loader() -> None:
    """Batches through the copy stream arrive whole while the device is busy."""
    batches = [(torch.full((64, 3, 224, 224), i).float(), torch.full((64,), i)) for i in range(8)]
    batches = [tuple(x.pin_memory() for x in b) if IS_GPU else b for b in batches]
    busy = torch.randn(2048, 2048, device=DEVICE) if IS_GPU else torch.randn(8, 8)
    for i, (imgs, labels) in enumerate(DeviceLoader(batches, DEVICE, [0.5] * 3, [0.5] * 3)):
        busy = (busy @ busy).tanh()
        assert (imgs == i).all() and (labels == i).all()


def check_correctness() -> int:
    """Run every check; returns how many failed."""
    checks = {
        "float32": lambda: check_loss(None),
        "bfloat16": lambda: check_loss(torch.bfloat16),
        "recompute gelu": lambda: check_loss(torch.bfloat16, "gelu"),
        "recompute all": lambda: check_loss(torch.bfloat16, "all"),
        "grad_checkpointing": lambda: check_loss(torch.bfloat16, "blocks"),
        "fine-tuning, evaluation": check_classifier,
        "loader": check_loader,
        "DDP, accumulation": lambda: check_ddp(""),
    }
    if IS_GPU:
        checks |= {
            "float16 with loss scaling": lambda: check_loss(torch.float16),
            "compiled blocks": lambda: check_loss(torch.bfloat16, compiled="blocks"),
            "compiled whole": lambda: check_loss(torch.bfloat16, compiled="whole"),
            "DDP, compiled": lambda: check_ddp("blocks"),
        }
    return sum(not attempt(name, check) for name, check in checks.items())


def show_kernels() -> None:
    """The 15 largest kernels of a step, and the time the device was busy against wall time."""
    row = STEP.format("base", 256, 0.25, "--amp bf16") if IS_GPU else TINY
    args = benchmark.get_args_parser().parse_args(row.split())
    amp_dtype = torch.bfloat16 if IS_GPU else None
    model = build_model(args, DEVICE)
    step, _ = build_steps(model, build_losses(model, args, DEVICE, amp_dtype), amp_dtype, DEVICE)
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * IS_GPU
    with profile(activities=activities) as recorded:
        start = time.perf_counter()
        for _ in range(3):
            step()
        if IS_GPU:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    events = recorded.key_averages()
    if IS_GPU:
        busy = sum(e.self_device_time_total for e in events) / 1e6
        print(f"device busy {busy:.3f} s of {seconds:.3f} s")
    order = "self_device_time_total" if IS_GPU else "self_cpu_time_total"
    print(events.table(sort_by=order, row_limit=15, max_name_column_width=80))


def attempt(name: str, call) -> bool:
    """Call; a failure is printed. Returns whether it succeeded."""
    start = time.perf_counter()
    try:
        call()
    except Exception:
        print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
        return False
    finally:
        torch._dynamo.reset()
        if IS_GPU:
            torch.cuda.empty_cache()
    print(f"ok {name} ({time.perf_counter() - start:.1f} s)", flush=True)
    return True


def main(group: str, results: Path) -> int:
    print(torch.__version__, torch.cuda.get_device_name(DEVICE) if IS_GPU else "cpu", flush=True)
    if group == "correctness":
        return check_correctness()
    if group == "kernels":
        return not attempt(group, show_kernels)
    rows = (ROWS if IS_GPU else TINY_ROWS)[group]
    return sum(not attempt(row, partial(measure, row, results)) for row in rows)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1], Path(sys.argv[2])), 1))
