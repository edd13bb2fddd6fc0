"""What a pre-training model does, as pictures: uint8 tensors (3, height, width) for PNG files and
TensorBoard.

Letters: B images, C channels, H height, W width, L patches, J decoder blocks, K feature maps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from util.io.errors import UserError
from util.vis.figures import GREY, Page, enlarge, enlargement, hatch, heat_map, patch_area, to_rgb

COLUMNS = ("original", "masked", "predicted", "pasted")


class Reconstruction(NamedTuple):
    """One prediction, in the model's scale of pixels."""

    pixels: Tensor  # (B, C, H, W), meaningless where nothing is predicted
    visible: Tensor  # (B, L) bool
    predicted: Tensor  # (B, L) bool; a patch that is neither was masked and is not predicted
    loss: float


def draw_noise(model: nn.Module, num_images: int, seed: int) -> Tensor:
    """Random order of the patches (B, L) that depends on the seed alone, not on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_images, model.patch_embed.num_patches, generator=generator)


@torch.no_grad()
def reconstruct(
    model: nn.Module, imgs: Tensor, noise: Tensor, mask_ratio: float, kept_mask_ratio: float
) -> Reconstruction:
    """Mask imgs (B, C, H, W) by noise (B, L) and predict.

    With norm_pix_loss the model predicts patches without their mean and deviation; those of the
    original are put back.

    Raises:
        UserError: the ratios leave nothing visible or predicted, or exceed each other.
    """
    masking = model.draw_masking(imgs, mask_ratio, kept_mask_ratio, noise)
    loss, pred, _, mask = model(imgs, mask_ratio, kept_mask_ratio, vis=True, noise=noise)
    pred = pred.float()
    if model.norm_pix_loss:
        var, mean = torch.var_mean(model.patchify(imgs.float()), dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    visible = torch.zeros_like(mask).scatter_(1, masking.ids_keep, 1)
    return Reconstruction(model.unpatchify(pred), visible.bool(), mask.bool(), loss.item())


def reconstruction_columns(
    imgs: Tensor, result: Reconstruction, grid: tuple[int, int], mean, std, factor: int = 1
) -> Tensor:
    """Original, masked, predicted and pasted pictures: uint8 (4, B, 3, H * factor, W * factor).

    Hidden patches are grey, as are the visible ones beside the predicted; a masked patch that is
    not predicted is hatched.

    Args:
        grid: (rows, columns) of patches.
        factor: a whole number, enlarges.
    """
    height, width = (side * factor for side in imgs.shape[2:])
    side = height // grid[0]
    original, predicted = (
        enlarge(to_rgb(x, mean, std), factor).cpu() for x in (imgs, result.pixels)
    )
    visible = patch_area(result.visible, grid, side).cpu()
    is_predicted = patch_area(result.predicted, grid, side).cpu()
    stripes = hatch(height, width, max(2, side // 5))
    filled = torch.where(is_predicted, predicted, stripes)
    masked = original.where(visible, GREY)
    alone = filled.where(~visible, GREY)
    return torch.stack([original, masked, alone, original.where(visible, filled)])


def reconstruction_grid(
    model: nn.Module,
    imgs: Tensor,
    args,
    mask_ratios: Sequence[float] | None = None,
    kept_mask_ratio: float | None = None,
    seed: int = 0,
    title: str = "",
) -> Tensor:
    """One row per picture: original, masked, predicted, predicted pasted into the visible patches.

    Args:
        model: MAE or CrossMAE, without DDP around it.
        imgs: (B, C, H, W), normalised, on the model's device.
        args: mean, std, mask_ratio and kept_mask_ratio the model was trained with.
        mask_ratios: one block of rows each, with nested masks (default: args.mask_ratio).
        kept_mask_ratio: share of all patches that is predicted (default: of the masked patches
            the share that training predicted).
        seed: of the masks.
        title: first line.

    Raises:
        UserError: the ratios do not fit together, or the model ignores kept_mask_ratio.
    """
    noise = draw_noise(model, len(imgs), seed).to(imgs.device)
    factor = enlargement(*imgs.shape[2:])
    page = Page()
    if title:
        page.add_text(title)
    for note in notes(model, imgs.shape[1]):
        page.add_text(note)
    for mask_ratio in mask_ratios or [args.mask_ratio]:
        kept = share_to_predict(model, args, mask_ratio, kept_mask_ratio)
        result = reconstruct(model, imgs, noise, mask_ratio, kept)
        page.add_text(describe(result, mask_ratio))
        grid = model.patch_embed.grid_size
        columns = reconstruction_columns(imgs, result, grid, args.mean, args.std, factor)
        for i, tiles in enumerate(columns.transpose(0, 1)):
            page.add_tiles(list(tiles), COLUMNS if i == 0 else ())
    return page.draw()


def feature_map_weights(model: nn.Module, title: str = "") -> Tensor:
    """The learned mixture of encoder feature maps, as a heat map: J decoder blocks x K maps.

    Raises:
        UserError: the model has none.
    """
    if not getattr(model, "weight_fm", False):
        raise UserError(
            "This model does not weight feature maps: only a CrossMAE trained with --weight_fm "
            "does."
        )
    weights = model.wfm.linear.weight
    columns = ["input"] * model.use_input + [str(i + 1) for i in model.use_fm]
    page = Page()
    if title:
        page.add_text(title)
    page.add_text(
        "Weights of the encoder's feature maps (columns: encoder blocks) in what each decoder "
        "block (rows) reads. Blue is negative, white 0, red positive."
    )
    rows = [f"decoder block {j + 1}" for j in range(len(weights))]
    page.add_picture(heat_map(weights, rows, columns, signed=True))
    return page.draw()


def share_to_predict(
    model: nn.Module, args, mask_ratio: float, kept_mask_ratio: float | None
) -> float:
    """The kept_mask_ratio to draw with.

    Raises:
        UserError: one is asked for, but the model predicts every masked patch.
    """
    if not predicts_a_part(model):
        if kept_mask_ratio is not None:
            raise UserError(
                "--kept_mask_ratio belongs to CrossMAE, but this is an MAE, which predicts every "
                "masked patch: leave it out."
            )
        return mask_ratio
    if kept_mask_ratio is not None:
        return kept_mask_ratio
    if mask_ratio == args.mask_ratio:
        return args.kept_mask_ratio
    return mask_ratio * (args.kept_mask_ratio / args.mask_ratio)


def predicts_a_part(model: nn.Module) -> bool:
    """Whether the decoder is CrossMAE's, whose queries do not need each other."""
    return hasattr(model.decoder_blocks[0], "cross_attn")


def notes(model: nn.Module, num_channels: int) -> list[str]:
    """What one has to know to read the colours."""
    found = []
    if model.norm_pix_loss:
        found.append(
            "norm_pix_loss: the model predicts pixels normalised within each patch; "
            "patch mean + std are taken from the original."
        )
    if num_channels > 3:
        found.append(f"{num_channels} channels: the first three are drawn as red, green, blue.")
    if num_channels == 2:
        found.append("2 channels: the first is drawn.")
    return found


def describe(result: Reconstruction, mask_ratio: float) -> str:
    """The line above a block of rows."""
    total = result.visible.shape[1]
    visible, predicted = (int(x[0].sum()) for x in (result.visible, result.predicted))
    text = f"mask ratio {mask_ratio:g}: {visible} of {total} patches visible, {predicted} predicted"
    if visible + predicted < total:
        text += f", {total - visible - predicted} neither (hatched)"
    return f"{text}; loss {result.loss:.3f}"
