"""Several pre-training models side by side on the same masked images, as a figure."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from util.io.errors import UserError
from util.vis import figures
from util.vis.figures import GAP, LINE
from util.vis.reconstruction import (
    are_gray,
    column_layout,
    draw_noise,
    notes,
    reconstruct,
    reconstruction_columns,
)


def draw_comparison(
    models: Sequence,
    imgs: Tensor,
    mask_ratio: float | None = None,
    seed: int = 0,
    caption: str = "",
) -> Figure:
    """One row per image: original, masked, and each model's prediction with the visible patches.

    All masked patches are predicted, also by a CrossMAE that was trained to predict a part.

    Args:
        models: (model, args it was trained with); MAE or CrossMAE.
        imgs: (B, C, H, W), normalized, on the models' device.
        mask_ratio: default: the first model's.
        seed: of the masks.
        caption: first line of the caption.

    Raises:
        UserError: the models differ in their input or their patches.
    """
    check_inputs(models)
    first, args = models[0]
    mask_ratio = mask_ratio or args.mask_ratio
    noise = draw_noise(first, len(imgs), seed).to(imgs.device)
    results = [reconstruct(model, imgs, noise, mask_ratio, mask_ratio) for model, _ in models]
    # (4, B, H, W, 3) each: original, masked, prediction, prediction with the visible patches
    drawn = [
        reconstruction_columns(imgs, result, first.patch_embed.grid_size, args.mean, args.std)
        for result in results
    ]
    columns = [drawn[0][0], drawn[0][1], *(parts[3] for parts in drawn)]
    titles = ["original", "masked", *(title(*pair) for pair in models)]
    height, width, pitch = column_layout(imgs)
    figure, top = figures.new_figure(), 2 * LINE + GAP // 2
    for j, (text, images) in enumerate(zip(titles, columns, strict=True)):
        figures.add_text(figure, text, j * pitch, (1 - text.count("\n")) * LINE)
        for i, image in enumerate(images):
            place = j * pitch, top + i * (height + GAP)
            figures.add_image(figure, image, *place, width, height)
    losses = ", ".join(f"{result.loss:.3f}" for result in results)
    sentences = notes(first, imgs.shape[1], False, are_gray(columns[0]).any())
    window_note = figures.windows_note(figures.choose_windows(imgs, args.mean, args.std))
    masked = f"Mask ratio {mask_ratio:g} (gray); loss over all masked patches: {losses}."
    return figures.fit(figure, caption, masked, *sentences, window_note)


def title(model, args) -> str:
    return f"CrossMAE\nkept {args.kept_mask_ratio:g}" if model.kind == "crossmae" else "MAE"


def check_inputs(models: Sequence) -> None:
    """Raises UserError unless all models take the same images, masks and scale of pixels."""

    def describe(model, args) -> dict:
        embed = model.patch_embed
        return {
            "patch grid": embed.grid_size,
            "patch size": embed.patch_size,
            "channels": embed.proj.in_channels,
            "mean": list(args.mean),
            "std": list(args.std),
            "norm_pix_loss": model.norm_pix_loss,
        }

    first, *others = (describe(*pair) for pair in models)
    for other in others:
        for name, value in first.items():
            if other[name] != value:
                raise UserError(
                    f"Models with {name} {value} and {other[name]} cannot be compared; choose runs "
                    "with equal inputs."
                )
