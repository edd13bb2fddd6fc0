"""Figures on TensorBoard during pre-training: reconstructions, attention, feature-map weights.

matplotlib is imported when there is something to draw, not by every run.
"""

import logging

import torch
from torch import Tensor

from util.data.sources import evenly_spaced

logger = logging.getLogger(__name__)

FIGURES_PER_RUN = 20  # about how often a run draws


class ImageLog:
    """Draws the same few images again and again while a model learns to reconstruct them."""

    def __init__(self, args, writer, loader):
        """
        Args:
            writer: TensorBoard writer, or None: nothing is drawn.
            loader: --log_images of its images, spread evenly over the data set, are drawn.
        """
        self.args = args
        self.writer = writer if args.log_images else None
        if self.writer:
            indices = evenly_spaced(range(len(loader.dataset)), args.log_images)
            imgs = torch.stack([loader.dataset[0, index][0] for index in indices])
            self.imgs = loader.prepare(imgs)  # (N, C, H, W), as the model gets them

    def show(self, model, epoch: int) -> None:
        """Draw what the model predicts after this epoch, about FIGURES_PER_RUN times per run.

        To be called after the epoch is saved; a failure is logged and costs the run nothing.
        """
        every = max(1, self.args.epochs // FIGURES_PER_RUN)
        if self.writer is None or (epoch % every and epoch != self.args.epochs - 1):
            return
        try:
            # Attention is read by hooks, which compiled blocks do not run.
            with torch.compiler.set_stance("force_eager"):
                figures = self.draw(model)
            step = (epoch + 1) * 1000 - 1  # before the first step of a run resumed here
            for name, figure in figures.items():
                self.writer.add_image(name, figure, step)
        except Exception:
            logger.warning("--log_images failed, training continues", exc_info=True)

    def draw(self, model) -> dict[str, Tensor]:
        """Figures by name, uint8 (3, height, width)."""
        from util.vis.attention_maps import draw_attention
        from util.vis.figures import figure_to_array
        from util.vis.reconstruction import draw_feature_map_weights, draw_reconstructions

        figures = {
            "reconstructions": draw_reconstructions(model, self.imgs, self.args),
            "attention": draw_attention(model, self.imgs[:1], self.args),
        }
        if model.kind == "crossmae" and model.weight_fm:
            figures["feature_map_weights"] = draw_feature_map_weights(model)
        return {name: figure_to_array(figure) for name, figure in figures.items()}
