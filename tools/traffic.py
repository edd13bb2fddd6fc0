"""Memory traffic of a training step, counted operator by operator on tensors without data.

Bytes of an operator are those of the elements it reads and writes; views cost nothing. Tensors are
on the CPU, with the rule of CUDA's autocast that LayerNorm works in float32, so that a GPU's
step is counted without one. Shapes: B images, L patches.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.benchmark_step import build_losses, build_model
from tools.measure import Timer
from util.io.errors import UserError
from util.layers.masking import num_visible_and_predicted

MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")
# Dense matrix products and memory as the vendors state them: TFLOP/s of bfloat16 (float32 sums)
# and of TF32, TB/s
GPUS = {
    "RTX 4090": (165, 82.6, 1.008),
    "A100 80GB": (312, 156, 2.039),
    "H100 SXM": (989, 494, 3.35),
    "H200": (989, 494, 4.8),
}


class Traffic(TorchDispatchMode):
    """Counts the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.reset([])

    def reset(self, parameters: list[Tensor]) -> None:
        """Start counting; the parameters themselves do not count as kept for backward."""
        self.bytes = Counter()  # by operator
        self.work: list[tuple[int, int]] = []  # (FLOPs, bytes) of each kernel
        self.kept_bytes = 0
        self.not_counted = {p.untyped_storage()._cdata for p in parameters}
        self.kept: dict[int, Tensor] = {}  # by storage; alive, so that no storage is used again

    def keep(self, x: Tensor) -> Tensor:
        """Hook for tensors that autograd keeps."""
        storage = x.untyped_storage()._cdata
        if storage not in self.not_counted:
            self.kept.setdefault(storage, x)
        return x

    def release(self) -> None:
        """Sum up what was kept."""
        self.kept_bytes = sum(x.untyped_storage().nbytes() for x in self.kept.values())
        self.kept.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.overloadpacket.__name__ == "_foreach_copy_":
            outputs, inputs = args[0], args[1]
        if func.is_view or not outputs or is_free(func, inputs, outputs):
            return out
        if func.overloadpacket.__name__ in ("copy_", "fill_", "zero_"):
            inputs = inputs[1:]  # the first one is written only
        num_bytes = sum(map(touched_bytes, inputs + outputs))
        count_flops = flop_registry.get(func.overloadpacket)
        flops = count_flops(*args, **(kwargs or {}), out_val=out) if count_flops else 0
        self.bytes[func.overloadpacket.__name__] += num_bytes
        self.work.append((flops, num_bytes))
        return out

    @property
    def kernels(self) -> int:
        return len(self.work)

    @property
    def matmul_bytes(self) -> int:
        """Of matrix products and attention."""
        return sum(self.bytes[name] for name in self.bytes if name.startswith(MATMULS))

    @property
    def other_bytes(self) -> int:
        return self.bytes.total() - self.matmul_bytes

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Each kernel takes the longer of its FLOPs and its bytes at the stated rates."""
        return sum(max(f / flops_per_s, b / bytes_per_s) for f, b in self.work)


def is_free(func, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether nothing is read or written: allocations, aliases, reshapes without a copy."""
    name = func.overloadpacket.__name__
    if name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "alias", "lift")):
        return True
    return func.namespace == "prim"


def touched_bytes(x: Tensor) -> int:
    """Bytes of the distinct elements of x; expanded dimensions count once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.element_size()


class LikeCuda(TorchFunctionMode):
    """LayerNorm under autocast in float32, and boolean masks that select num_selected elements."""

    def __init__(self, num_selected: int):
        super().__init__()
        self.num_selected = num_selected

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__ and getattr(args[1], "dtype", None) is torch.bool:
            where = torch.empty(self.num_selected, args[1].ndim, dtype=torch.int64)  # by nonzero()
            return args[0][tuple(where.unbind(1))]
        if func in (F.layer_norm, torch.native_layer_norm) and torch.is_autocast_enabled("cpu"):
            args = [x.float() if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


def measure_traffic(args, device: torch.device, timer: Timer) -> dict:
    """Forward and backward of pre-training by this code and by the reference implementation.

    Raises:
        UserError: the ratios leave no patch to see or to predict, or the precision is fp16.
    """
    if args.amp == "fp16" or args.grad_checkpointing:
        flag = "--amp fp16" if args.amp == "fp16" else "--grad_checkpointing"
        raise UserError(f"--what traffic does not count {flag}; use --amp bf16 or off.")
    amp_dtype = None if args.amp == "off" else torch.bfloat16  # auto: what a GPU would choose
    ours, reference = (count_step(args, amp_dtype, which) for which in (0, 1))
    result = {"amp": "bf16" if amp_dtype else "off", "recompute": args.recompute}
    for name, traffic in (("", ours), ("_textbook", reference)):
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
    return result


def count_step(args, amp_dtype: torch.dtype | None, which: int) -> Traffic:
    """Traffic of forward and backward: by the model (which = 0) or by the reference (1)."""
    cpu = torch.device("cpu")
    with torch.device("meta"):
        model = build_model(args, torch.device("meta"))
    num_patches = model.patch_embed.num_patches
    _, num_predicted = num_visible_and_predicted(
        num_patches, args.mask_ratio, args.mask_ratio if args.mae else args.kept_mask_ratio
    )
    with FakeTensorMode(), Traffic() as traffic, LikeCuda(args.batch_size * num_predicted):
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype))
        loss = build_losses(model, args, cpu, amp_dtype)[which]
        traffic.reset([*model.parameters(), *model.buffers()])
        with saved_tensors_hooks(traffic.keep, lambda x: x):
            value = loss()
        traffic.release()
        value.backward()
    return traffic
