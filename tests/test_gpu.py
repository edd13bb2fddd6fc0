"""Checks that need a GPU, skipped otherwise: `bash scripts/test.sh -m gpu`."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tools.bench.reference import reference_loss
from util.layers.attention import FlashPackageBackend, get_attention_backend
from util.layers.vit import compile_model
from util.optim import NativeScalerWithGradNormCount, build_adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def disable_tf32():
    """Compute float32 matrix products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae"])
def test_float32_loss_and_gradients_match_cpu(factory, request):
    model = request.getfixturevalue(factory)()
    imgs, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    losses, grads = [], []
    for device in (torch.device("cpu"), GPU):
        model.to(device).zero_grad(set_to_none=True)
        loss = model(imgs.to(device), noise=noise.to(device))
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    assert abs(losses[0] - losses[1]) < 1e-5
    for on_cpu, on_gpu in zip(*grads, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flash", [False, True])
def test_half_precision_error_is_that_of_the_reference(tiny_cross, dtype, flash):
    model = tiny_cross(attention_backend=get_attention_backend(flash, GPU, dtype)).to(GPU)
    imgs = torch.randn(8, 3, 32, 32, device=GPU)
    noise = torch.rand(8, 16, device=GPU)
    exact = reference_loss(model, imgs, 0.75, 0.75, noise).item()
    with torch.autocast("cuda", dtype):
        loss = model(imgs, noise=noise)
        expected = reference_loss(model, imgs, 0.75, 0.75, noise)
    assert abs(loss.item() - exact) <= 2 * abs(expected.item() - exact) + 1e-3
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_flash_attn_is_used_if_installed():
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    if torch.cuda.get_device_capability(GPU) >= (8, 0):
        assert isinstance(get_attention_backend(True, GPU, torch.bfloat16), FlashPackageBackend)


def test_training_step_does_not_synchronize(tiny_cross):
    model = tiny_cross().to(GPU)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = build_adamw(groups, 1e-4, (0.9, 0.95))
    scaler = NativeScalerWithGradNormCount()
    imgs = torch.randn(8, 3, 32, 32, device=GPU)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(imgs)
        scaler(loss, optimizer)
        optimizer.zero_grad(set_to_none=True)

    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [str(w.message) for w in caught if "synchroniz" in str(w.message)] == []


def test_compiled_blocks_match_uncompiled_loss(tiny_cross):
    model = tiny_cross().to(GPU)
    imgs, noise = torch.randn(4, 3, 32, 32, device=GPU), torch.rand(4, 16, device=GPU)
    expected = model(imgs, noise=noise).item()
    compile_model(model)
    loss = model(imgs, noise=noise)
    loss.backward()
    assert abs(loss.item() - expected) < 1e-4


def test_torchrun_training_uses_nccl(image_folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += "main_pretrain.py --model mae_vit_mini_patch4 --input_size 32 --cross_mae".split()
    command += "--weight_fm --use_input --batch_size 4 --epochs 2 --warmup_epochs 1".split()
    command += ["--num_workers", "2", "--data_path", str(image_folder)]
    command += ["--output_dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nccl" in done.stdout and "max mem" in done.stdout
