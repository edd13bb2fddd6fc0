"""What a pre-training model predicts, and the weights of the feature maps it reads, as figures.

Notation: B images, C channels, H height, W width, L patches, J decoder blocks, K feature maps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from util.io.errors import UserError
from util.vis import figures
from util.vis.figures import DPI, GAP, LINE

COLUMNS = ("original", "masked", "prediction", "prediction\n+ visible")
GRAY = 128  # not shown: masked patches; beside the prediction, the visible ones
UNPREDICTED = 215  # masked patches that are not predicted
TILE_SIDE = int(1.25 * DPI)  # pixels to which small images are enlarged, about
COLUMN_WIDTH = int(0.6 * DPI)  # pixels, at least: the titles need them


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

    With norm_pix_loss the model predicts patches without their mean and std; those of the original
    are put back.

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
    imgs: Tensor, result: Reconstruction, grid: tuple[int, int], mean, std
) -> np.ndarray:
    """The images of COLUMNS, uint8 (4, B, H, W, 3); grid is (rows, columns) of patches.

    Of gray images, the mean of the predicted channels is shown.
    """
    windows = figures.choose_windows(imgs, mean, std)
    original, predicted = (figures.to_rgb(x, mean, std, windows) for x in (imgs, result.pixels))
    gray = are_gray(original)
    predicted[gray] = predicted[gray].mean(axis=-1, keepdims=True).round()
    side = original.shape[1] // grid[0]
    visible = patch_area(result.visible, grid, side)[..., None]
    is_predicted = patch_area(result.predicted, grid, side)[..., None]
    filled = np.where(is_predicted, predicted, np.uint8(UNPREDICTED))
    masked = np.where(visible, original, np.uint8(GRAY))
    alone = np.where(visible, np.uint8(GRAY), filled)
    return np.stack([original, masked, alone, np.where(visible, original, filled)])


def are_gray(pixels: np.ndarray) -> np.ndarray:
    """Which images (B, H, W, 3) have equal channels, bool (B,)."""
    return (pixels == pixels[..., :1]).all(axis=(1, 2, 3))


def patch_area(chosen: Tensor, grid: tuple[int, int], side: int) -> np.ndarray:
    """Patches (B, L) as the pixels they cover, bool (B, H, W)."""
    patches = chosen.cpu().numpy().astype(bool).reshape(-1, *grid)
    return patches.repeat(side, axis=1).repeat(side, axis=2)


def draw_reconstructions(
    model: nn.Module,
    imgs: Tensor,
    args,
    mask_ratios: Sequence[float] | None = None,
    kept_mask_ratio: float | None = None,
    seed: int = 0,
    caption: str = "",
) -> Figure:
    """One row per image: original, masked, prediction, prediction with the visible patches.

    In the PNG file, every pixel of an image is a square of whole pixels.

    Args:
        model: MAE or CrossMAE, without DDP around it.
        imgs: (B, C, H, W), normalized, on the model's device.
        args: mean, std, mask_ratio and kept_mask_ratio the model was trained with.
        mask_ratios: one block of rows each, with nested masks (default: args.mask_ratio).
        kept_mask_ratio: ratio of all patches that is predicted (default: the fraction of the
            masked patches that training predicted).
        seed: of the masks.
        caption: first line of the caption.

    Raises:
        UserError: the ratios do not fit together, or the model ignores kept_mask_ratio.
    """
    noise = draw_noise(model, len(imgs), seed).to(imgs.device)
    height, width, pitch = column_layout(imgs)
    figure, top, is_partial = figures.new_figure(), 0, False
    for mask_ratio in mask_ratios or [args.mask_ratio]:
        kept = choose_kept_mask_ratio(model, args, mask_ratio, kept_mask_ratio)
        result = reconstruct(model, imgs, noise, mask_ratio, kept)
        is_partial |= not (result.visible | result.predicted).all()
        top = figures.add_text(figure, describe(result, mask_ratio), 0, top, 4 * pitch) + GAP // 2
        for j, title in enumerate(COLUMNS):
            figures.add_text(figure, title, j * pitch, top + (1 - title.count("\n")) * LINE)
        top += 2 * LINE + GAP // 2
        grid = model.patch_embed.grid_size
        columns = reconstruction_columns(imgs, result, grid, args.mean, args.std)
        for row in columns.swapaxes(0, 1):
            for j, image in enumerate(row):
                figures.add_image(figure, image, j * pitch, top, width, height)
            top += height + GAP
        top += GAP
    has_gray = are_gray(figures.to_rgb(imgs, args.mean, args.std)).any()
    window_note = figures.windows_note(figures.choose_windows(imgs, args.mean, args.std))
    sentences = notes(model, imgs.shape[1], is_partial, has_gray)
    gray = "Gray: masked patches and, beside the prediction, the visible ones."
    return figures.fit(figure, caption, gray, *sentences, window_note)


def column_layout(imgs: Tensor) -> tuple[int, int, int]:
    """Height and width of an image in the figure, and the distance of two columns, in pixels."""
    enlargement = max(1, round(TILE_SIDE / max(imgs.shape[2:])))  # of small images
    height, width = (side * enlargement for side in imgs.shape[2:])
    return height, width, max(width, COLUMN_WIDTH) + GAP


def describe(result: Reconstruction, mask_ratio: float) -> str:
    """The line above a block of rows."""
    total = result.visible.shape[1]
    visible, predicted = (int(x[0].sum()) for x in (result.visible, result.predicted))
    return (
        f"Mask ratio {mask_ratio:g}: {visible} of {total} patches visible, {predicted} predicted; "
        f"loss {result.loss:.3f}"
    )


def notes(model: nn.Module, num_channels: int, is_partial: bool, has_gray: bool) -> list[str]:
    """What a reader has to know, one sentence each."""
    found = []
    if is_partial:
        found.append("Light gray: masked patches that are not predicted.")
    if model.norm_pix_loss:
        found.append(
            "Pixels are predicted normalized within each patch (norm_pix_loss); mean and contrast "
            "of each patch are taken from the original."
        )
    if num_channels == 3 and has_gray:
        found.append("Of gray images, the mean of the predicted channels is shown.")
    if num_channels > 3:
        found.append(f"Of {num_channels} channels, the first three are shown as RGB.")
    if num_channels == 2:
        found.append("Of 2 channels, the first is shown.")
    return found


def choose_kept_mask_ratio(
    model: nn.Module, args, mask_ratio: float, kept_mask_ratio: float | None
) -> float:
    """The kept_mask_ratio to draw with; UserError if one is given for an MAE."""
    if model.kind == "mae":
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


def draw_feature_map_weights(model: nn.Module, caption: str = "") -> Figure:
    """The learned weights of the encoder's feature maps, a heat map of J decoder blocks x K maps;
    UserError if the model has none.
    """
    if model.kind != "crossmae" or not model.weight_fm:
        raise UserError(
            "This model does not weight feature maps; give a CrossMAE trained with --weight_fm."
        )
    weights = model.wfm.linear.weight.detach().float().cpu().numpy()
    maps = ["0"] * model.use_input + [str(i + 1) for i in model.use_fm]
    limit = np.abs(weights).max() or 1.0
    width = max(DPI // 6, min(DPI // 3, int(6.5 * DPI / len(maps))))  # of a cell
    height = max(DPI // 5, DPI // len(weights))
    texts = np.char.replace(np.char.mod("%.2f", weights.round(2) + 0.0), "-", "\N{MINUS SIGN}")
    names = [str(j + 1) for j in range(len(weights))], maps
    options = dict(cmap="RdBu_r", vmin=-limit, vmax=limit, texts=texts, text_size=6)
    figure = figures.new_figure()
    axes = figures.add_heat_map(figure, weights, 0, 0, width, height, names, "weight", **options)
    axes.set_xlabel("encoder block" + " (0: its input tokens)" * model.use_input)
    axes.set_ylabel("decoder block")
    return figures.fit(figure, caption)
