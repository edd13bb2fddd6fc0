"""--compile: torch.compile on each transformer block, not on the whole model.

Blocks of one kind share one compiled program, so it is made once per kind and shape. Blocks are
compiled in place: names in the state dict stay what they are.
"""

from torch import nn

from util.layers.blocks import Block, CrossAttentionBlock


def compile_blocks(model: nn.Module, **options) -> None:
    """Compile every block of the model in place; options go to torch.compile."""
    for module in model.modules():
        if isinstance(module, Block | CrossAttentionBlock):
            module.compile(**options)
