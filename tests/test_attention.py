"""Attention backends against the formula; selection of the backend and its reported reason."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from util.layers.attention import (
    AttentionBackend,
    FlashKernelBackend,
    FlashPackageBackend,
    get_attention_backend,
)

CPU = torch.device("cpu")


def reference_attention(q, k, v):
    """Softmax attention, q (B, N, H, d), k and v (B, M, H, d)."""
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(dim=-1), v)


@pytest.mark.parametrize(
    "attention_backend", [AttentionBackend(), FlashKernelBackend("a test")], ids=["sdpa", "flash"]
)
@pytest.mark.parametrize("width", [32, 64, 80])
def test_backends_match_the_formula(attention_backend, width):
    qkv = torch.randn(2, 7, 3, 4, width, requires_grad=True)
    q, kv = torch.randn(2, 5, 4, width), torch.randn(2, 9, 2, 4, width)
    expected = reference_attention(*qkv.unbind(2))
    out = attention_backend.self_attention(qkv)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out_grad = torch.randn_like(out)
    torch.testing.assert_close(
        *(torch.autograd.grad((x * out_grad).sum(), qkv)[0] for x in (out, expected)),
        atol=1e-5,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        attention_backend.cross_attention(q, kv),
        reference_attention(q, *kv.unbind(2)),
        atol=1e-5,
        rtol=1e-5,
    )


def test_name_states_why_flash_attn_is_not_used_on_cpu():
    assert get_attention_backend(False, CPU, None).name == "torch scaled_dot_product_attention"
    attention_backend = get_attention_backend(True, CPU, None)
    assert "FlashAttention-2" in attention_backend.name and "on the CPU" in attention_backend.name


def mock_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda", 0)


def test_name_states_why_flash_attn_is_not_used_on_gpu(monkeypatch):
    device = mock_gpu(monkeypatch, (7, 5))
    assert "has 7.5" in get_attention_backend(True, device, torch.float16).name
    device = mock_gpu(monkeypatch, (8, 9))
    assert "--amp off" in get_attention_backend(True, device, None).name
    # a package of that name without the functions
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    name = get_attention_backend(True, device, torch.bfloat16).name
    assert "pip install flash-attn --no-build-isolation" in name


def test_flash_attn_is_used_only_in_half_precision(monkeypatch):
    package = types.ModuleType("flash_attn")
    package.__version__ = "2.0"
    package.flash_attn_qkvpacked_func = lambda qkv: reference_attention(*qkv.unbind(2)) + 1
    package.flash_attn_kvpacked_func = lambda q, kv: reference_attention(q, *kv.unbind(2)) + 1
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    attention_backend = get_attention_backend(True, mock_gpu(monkeypatch, (9, 0)), torch.bfloat16)
    assert (
        isinstance(attention_backend, FlashPackageBackend)
        and attention_backend.name == "flash-attn 2.0"
    )
    qkv = torch.randn(1, 3, 3, 2, 8)
    plain = AttentionBackend()
    assert torch.equal(attention_backend.self_attention(qkv), plain.self_attention(qkv))
    half = qkv.bfloat16()
    difference = attention_backend.self_attention(half).float() - plain.self_attention(half).float()
    assert ((difference - 1).abs() < 0.05).all()


def test_selection_changes_no_global_state():
    before = F.scaled_dot_product_attention

    def enabled_kernels():
        return (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        )

    enabled_before = enabled_kernels()
    get_attention_backend(True, CPU, None).self_attention(torch.randn(1, 2, 3, 1, 8))
    assert F.scaled_dot_product_attention is before
    assert enabled_kernels() == enabled_before == (True, True, True)


def test_16_bit_attention_on_a_cpu_computes_in_float32():
    """Not farther from the float64 result than one rounding, forward and gradients."""
    backend = get_attention_backend(False, torch.device("cpu"), torch.bfloat16)
    assert backend.name.endswith("in float32")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8).bfloat16() for n in (5, 7, 7))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    rounded = [x.requires_grad_() for x in (q, k, v)]
    weights = torch.einsum("bnhd,bmhd->bhnm", *exact[:2]).div(8**0.5).softmax(-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, exact[2])
    with torch.autocast("cpu", torch.bfloat16):
        out = backend.attention(*rounded)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction.double())
    for x, y in zip(rounded, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=2**-8, atol=1e-6)
