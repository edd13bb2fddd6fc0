"""Memory traffic of compiled code, as Inductor plans it: no code is generated, nothing is computed.

The plan is that of Inductor's CPU backend: its GPU backend has the same scheduler, but may fuse
more.
"""

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from tools.bench.traffic import MATMULS, Traffic, storage_id
from util.layers.vit import compile_model


def compile_counted(model: nn.Module, what: str, traffic: Traffic) -> None:
    """compile_model, but calls of what is compiled only add their kernels to traffic.

    Args:
        traffic: tools.bench.traffic.Traffic, the innermost mode while the model is called.
    """
    backend = aot_autograd(
        fw_compiler=lambda graph, _: compile_to_counter(graph, traffic),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    compile_model(model, what, backend=backend)
    for module in model.modules():
        if module._compiled_call_impl:  # nothing is compiled under a mode of this kind
            module._compiled_call_impl = traffic.suspend_in(module._compiled_call_impl)


def compile_to_counter(graph: fx.GraphModule, traffic: Traffic):
    """A function for the graph that adds its kernels and returns tensors without content."""
    with _disable_current_modes():
        kernels = plan_kernels(graph)
    *_, output = graph.graph.nodes
    outputs = [x if x is None else x.meta["val"] for x in output.args[0]]
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]

    def call(*inputs):
        for kernel in kernels:
            traffic.add(*kernel)
        storages = {storage_id(x): y for x, y in zip(placeholders, inputs, strict=True)}
        return [x if x is None else empty_view(x, storages) for x in outputs]

    return make_boxed_func(call)


def empty_view(x: Tensor, storages: dict[int, Tensor]) -> Tensor:
    """A tensor like x without content; tensors of one storage have one storage again."""
    size = x.untyped_storage().nbytes() // x.element_size()
    base = storages.setdefault(storage_id(x), torch.empty(size, dtype=x.dtype))
    return base.as_strided(x.shape, x.stride(), x.storage_offset())


def plan_kernels(graph: fx.GraphModule) -> list[tuple[str, int, int]]:
    """(operator, FLOPs, bytes) of the kernels that Inductor plans; its own are named "fused"."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    lowering = GraphLowering(graph, example_inputs=inputs)
    mode = torch._guards.detect_fake_mode(inputs)
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowering.run(*inputs)
        lowering._update_scheduler()
        sizes = [(node, node.get_read_write_buffers_sizes()) for node in lowering.scheduler.nodes]
    return [(*name_and_flops(node), size) for node, size in sizes if size]


def name_and_flops(kernel) -> tuple[str, int]:
    """Of a node of Inductor's scheduler."""
    if not kernel.is_extern():
        return "fused", 0
    for node in kernel.node.origins:
        operator = getattr(node.target, "overloadpacket", None)
        if operator and operator.__name__.startswith(MATMULS):
            return operator.__name__, flops_of(node)
    return "other", 0


def flops_of(node: fx.Node) -> int:
    """Of a matrix product; 0 for operators that PyTorch's FLOP counter does not know."""
    count = flop_registry.get(node.target.overloadpacket)
    args, kwargs, out = tree_map_only(
        fx.Node, lambda x: x.meta["val"], (node.args, node.kwargs, node)
    )
    return count(*args, **kwargs, out_val=out) if count else 0
