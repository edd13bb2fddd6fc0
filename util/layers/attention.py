"""Attention, in one place: softmax(q k^T / sqrt(d)) v. The only file that knows the flash-attn
package.

Shapes: B images, N query tokens, M key tokens, H heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

INSTALL_HINT = "pip install flash-attn --no-build-isolation"
HALF = (torch.float16, torch.bfloat16)


class AttentionBackend:
    """PyTorch's scaled_dot_product_attention, which chooses its kernel.

    Projections stay packed as the linear layers produce them, which saves a copy.
    """

    name = "torch scaled_dot_product_attention"

    def self_attention(self, qkv: Tensor) -> Tensor:
        """qkv (B, N, 3, H, d) -> (B, N, H, d)."""
        q, k, v = qkv.unbind(2)
        return self.attention(q, k, v)

    def cross_attention(self, q: Tensor, kv: Tensor) -> Tensor:
        """q (B, N, H, d), kv (B, M, 2, H, d) -> (B, N, H, d)."""
        k, v = kv.unbind(2)
        return self.attention(q, k, v)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, N, H, d), k and v (B, M, H, d) -> (B, N, H, d)."""
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)


class Float32Backend(AttentionBackend):
    """PyTorch's attention in float32, for 16-bit runs on a CPU.

    There its backward takes several times as long in bfloat16.
    """

    name = "torch scaled_dot_product_attention, in float32"

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return super().attention(q.float(), k.float(), v.float()).to(q.dtype)


class FlashKernelBackend(AttentionBackend):
    """PyTorch's attention, preferring its built-in FlashAttention-2 kernel."""

    def __init__(self, why_not_package: str):
        self.name = (
            "torch scaled_dot_product_attention, its own FlashAttention-2 kernel first "
            f"(package flash-attn not used: {why_not_package})"
        )

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(kernels, set_priority=True):
            return super().attention(q, k, v)


class FlashPackageBackend(AttentionBackend):
    """The flash-attn package in half precision; PyTorch's attention for float32 tensors."""

    def __init__(self, version: str, flash_attn_qkvpacked_func, flash_attn_kvpacked_func):
        self.name = f"flash-attn {version}"
        self.flash_qkv = flash_attn_qkvpacked_func
        self.flash_kv = flash_attn_kvpacked_func

    def self_attention(self, qkv: Tensor) -> Tensor:
        return self.flash_qkv(qkv) if qkv.dtype in HALF else super().self_attention(qkv)

    def cross_attention(self, q: Tensor, kv: Tensor) -> Tensor:
        return self.flash_kv(q, kv) if q.dtype in HALF else super().cross_attention(q, kv)


def get_attention_backend(
    flash: bool, device: torch.device, amp_dtype: torch.dtype | None
) -> AttentionBackend:
    """Choose the attention backend once, at startup; `.name` says which it is, and why.

    Args:
        flash: --enable_flash_attention2 was given.
        device: of the model.
        amp_dtype: autocast dtype of the run, or None for float32.
    """
    if not flash:
        is_slow = device.type == "cpu" and amp_dtype in HALF
        return Float32Backend() if is_slow else AttentionBackend()
    if device.type != "cuda":
        return FlashKernelBackend("it needs a CUDA device; this run is on the CPU")
    if amp_dtype not in HALF:
        return FlashKernelBackend("it needs half precision; this run is float32 (--amp off)")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return FlashKernelBackend(f"it needs compute capability 8.0, this GPU has {found}")
    try:
        # By name: with other flash-attn packages installed, `import flash_attn` alone may succeed.
        import flash_attn
        from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func
    except ImportError as error:
        return FlashKernelBackend(f"{error}; install it with `{INSTALL_HINT}`")
    version = getattr(flash_attn, "__version__", "(unknown version)")
    return FlashPackageBackend(version, flash_attn_qkvpacked_func, flash_attn_kvpacked_func)
