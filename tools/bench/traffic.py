"""Memory traffic, counted operator by operator.

Bytes of an operator are those of the elements it reads and writes; views cost nothing.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")


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
        self.not_counted = {storage_id(p) for p in parameters}
        self.kept: dict[int, Tensor] = {}  # by storage; alive, so that no storage is used again

    def keep(self, x: Tensor) -> Tensor:
        """Hook for tensors that autograd keeps."""
        if storage_id(x) not in self.not_counted:
            self.kept.setdefault(storage_id(x), x)
        return x

    def release(self) -> None:
        """Sum up what was kept."""
        self.kept_bytes = sum(x.untyped_storage().nbytes() for x in self.kept.values())
        self.kept.clear()

    def suspend_in(self, function):
        """The function, called without counting what it calls."""

        def call(*args, **kwargs):
            self.__exit__(None, None, None)
            try:
                return function(*args, **kwargs)
            finally:
                self.__enter__()

        return call

    def add(self, name: str, flops: int, num_bytes: int) -> None:
        """Count one kernel."""
        self.bytes[name] += num_bytes
        self.work.append((flops, num_bytes))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name == "_foreach_copy_":
            outputs, inputs = args[0], args[1]
        if func.is_view or not outputs or is_free(func):
            return out
        if name in ("copy_", "fill_", "zero_"):
            inputs = inputs[1:]  # the first one is written only
        flops_of = flop_registry.get(func.overloadpacket)
        flops = flops_of(*args, **kwargs, out_val=out) if flops_of else 0
        self.add(name, flops, sum(map(touched_bytes, inputs + outputs)))
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


def storage_id(x: Tensor) -> int:
    """Of the memory that a tensor shares with its views."""
    return x.untyped_storage()._cdata


def is_free(func) -> bool:
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
    """What tensors without data on a CPU need, to be counted as on a GPU.

    LayerNorm under autocast works in float32; a boolean mask, whose content is unknown, selects
    num_selected elements.
    """

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
