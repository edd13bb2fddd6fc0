"""Pictures on TensorBoard during pre-training: reconstructions, attention, feature-map weights."""

import torch
from torch import Tensor

from util.vis.attention_maps import attention_grid
from util.vis.reconstruction import feature_map_weights, reconstruction_grid

PICTURES_PER_RUN = 20  # about so many times a run shows its pictures


class ImageLog:
    """Shows the same few pictures again and again while a model learns to reconstruct them."""

    def __init__(self, args, writer, loader):
        """
        Args:
            writer: TensorBoard writer, or None: nothing is shown.
            loader: its first pictures, spread over the data set, are shown (--log_images of them).
        """
        self.args = args
        self.writer = writer if args.log_images else None
        self.imgs = self.pick(loader) if self.writer else None

    def pick(self, loader) -> Tensor:
        """Pictures (N, C, H, W) spread evenly over the data set, as the model gets them."""
        total = len(loader.dataset)
        count = min(self.args.log_images, total)
        items = [loader.dataset[0, i * total // count][0] for i in range(count)]
        return loader.prepare(torch.stack(items))

    def show(self, model, epoch: int) -> None:
        """Show where the model stands, if it is time to."""
        every = max(1, self.args.epochs // PICTURES_PER_RUN)
        if self.writer is None or (epoch % every and epoch != self.args.epochs - 1):
            return
        step = (epoch + 1) * 1000 - 1  # before that of a run that goes on with the next epoch
        self.writer.add_image(
            "reconstructions", reconstruction_grid(model, self.imgs, self.args), step
        )
        self.writer.add_image("attention", attention_grid(model, self.imgs[:1], self.args), step)
        if getattr(model, "weight_fm", False):
            self.writer.add_image("feature_map_weights", feature_map_weights(model), step)
