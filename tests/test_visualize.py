"""tools/visualize.py and util/vis: exact pixels and masks, attention, weights, file formats."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tools import visualize
from util.io.errors import CheckpointError, UserError
from util.layers.patchify import patchify
from util.layers.vit import compile_model
from util.vis.attention_maps import (
    COLORS,
    attention_weights,
    catch_outputs,
    draw_attention,
    read_attention,
)
from util.vis.comparison import draw_comparison
from util.vis.figures import (
    FORMATS,
    add_axes,
    add_heat_map,
    figure_to_array,
    fit,
    new_figure,
    plain,
    save_figure,
    to_rgb,
    wrap,
)
from util.vis.image_log import ImageLog
from util.vis.reconstruction import (
    COLUMNS,
    GRAY,
    UNPREDICTED,
    Reconstruction,
    draw_feature_map_weights,
    draw_noise,
    draw_reconstructions,
    reconstruct,
    reconstruction_columns,
)

MEAN, STD = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
SIZES = [(32, 32), (16, 48)]


@pytest.fixture(params=["cross", "mae"])
def build(request, tiny_cross, tiny_mae):
    return {"cross": tiny_cross, "mae": tiny_mae}[request.param]


def assert_axes_do_not_overlap(figure) -> None:
    """All axes lie inside the figure, and no two of them share a pixel."""
    boxes = [axes.get_position() for axes in figure.axes]
    for i, one in enumerate(boxes):
        assert min(one.x0, one.y0) >= 0 and max(one.x1, one.y1) <= 1, i
        for other in boxes[:i]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert width <= 1e-6 or height <= 1e-6, (one, other)


def draw_pixels(size: tuple[int, int], count: int = 2, channels: int = 3) -> torch.Tensor:
    """Random images, uint8 (count, C, H, W)."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, channels, *size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def make_perfect(model, imgs: torch.Tensor) -> None:
    """Let the decoder return the very target that its loss compares with."""
    is_cross = model.kind == "crossmae"

    def forward_decoder(context, masking):
        every = torch.arange(model.patch_embed.num_patches).expand(len(imgs), -1)
        return model.pixel_target(imgs, masking.ids_pred if is_cross else every)

    model.forward_decoder = forward_decoder


def sets_of(noise: list[float], num_visible: int, num_predicted: int) -> tuple[set, set]:
    """Visible and predicted patches of one image, by sorting."""
    order = sorted(range(len(noise)), key=noise.__getitem__)
    return set(order[:num_visible]), set(order[len(order) - num_predicted :])


def blocks_of(image: np.ndarray, side: int) -> list[np.ndarray]:
    """The patches of an image (H, W, 3) in raster order, by slicing."""
    height, width, _ = image.shape
    return [
        image[y : y + side, x : x + side]
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def columns_of(model, imgs, noise, mask_ratio=0.75, kept_mask_ratio=0.75):
    result = reconstruct(model, imgs, noise, mask_ratio, kept_mask_ratio)
    return reconstruction_columns(imgs, result, model.patch_embed.grid_size, MEAN, STD), result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_restores_the_image(build, norm_pix_loss, size):
    model = build(norm_pix_loss=norm_pix_loss, img_size=size)
    pixels = draw_pixels(size)
    imgs = normalize(pixels)
    make_perfect(model, imgs)
    pixels = pixels.permute(0, 2, 3, 1).numpy()
    (original, masked, predicted, both), result = columns_of(model, imgs, draw_noise(model, 2, 3))
    assert result.loss == pytest.approx(0, abs=1e-10)
    assert np.array_equal(original, pixels)
    assert np.abs(both.astype(int) - pixels).max() <= 1
    noise = draw_noise(model, 2, 3).tolist()
    num_patches = len(noise[0])
    for i in range(2):
        visible, _ = sets_of(noise[i], num_patches // 4, num_patches - num_patches // 4)
        for patch, (whole, seen, guess) in enumerate(
            zip(*(blocks_of(x[i], 8) for x in (pixels, masked, predicted)), strict=True)
        ):
            if patch in visible:
                assert np.array_equal(seen, whole) and (guess == GRAY).all()
            else:
                assert (seen == GRAY).all()
                assert np.abs(guess.astype(int) - whole.astype(int)).max() <= 1


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_unpredicted_patches_have_a_gray_of_their_own(tiny_cross, norm_pix_loss):
    """16 patches, ratios 0.75 / 0.25: 4 visible, 4 predicted, 8 neither."""
    model = tiny_cross(norm_pix_loss=norm_pix_loss)
    pixels = draw_pixels((32, 32))
    imgs = normalize(pixels)
    make_perfect(model, imgs)
    noise = draw_noise(model, 2, 0)
    (_, masked, predicted, both), _ = columns_of(model, imgs, noise, 0.75, 0.25)
    for i in range(2):
        visible, wanted = sets_of(noise[i].tolist(), 4, 4)
        whole = blocks_of(pixels[i].permute(1, 2, 0).numpy(), 8)
        parts = [blocks_of(x[i], 8) for x in (masked, predicted, both)]
        for patch, (seen, guess, filled) in enumerate(zip(*parts, strict=True)):
            if patch in visible | wanted:
                assert np.abs(filled.astype(int) - whole[patch].astype(int)).max() <= 1
            else:
                assert (seen == GRAY).all()
                assert (guess == UNPREDICTED).all() and (filled == UNPREDICTED).all()
    assert abs(UNPREDICTED - GRAY) > 50


@pytest.mark.parametrize(
    ("size", "factor", "channels"),
    [((32, 32), 10, 1), ((32, 32), 10, 2), ((16, 48), 7, 3), ((48, 16), 7, 5)],
)
def test_every_image_pixel_is_a_square_in_the_png(tmp_path, build, size, factor, channels):
    """The four images of each row are found in the file, enlarged exactly."""
    model = build(img_size=size, in_chans=channels)
    pixels = draw_pixels(size, 2, channels)
    args = options_of(mean=[0.4] * channels, std=[0.3] * channels)
    imgs = (pixels / 255 - 0.4) / 0.3
    ratios = [0.5, 0.75]
    save_figure(draw_reconstructions(model, imgs, args, ratios), tmp_path / "grid.png")
    page = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    height, width = (side * factor for side in size)
    for ratio in ratios:
        result = reconstruct(model, imgs, draw_noise(model, 2, 0), ratio, ratio)
        grid = model.patch_embed.grid_size
        columns = reconstruction_columns(imgs, result, grid, args.mean, args.std)
        assert np.array_equal(columns[0, :, ..., 0], pixels[:, 0].numpy())
        for images in columns.swapaxes(0, 1):
            large = images.repeat(factor, axis=1).repeat(factor, axis=2)
            top, second = find(page, large[1])  # the original is there once per ratio
            pitch = find(page, large[2])[1] - second
            left = second - pitch
            assert pitch >= width
            for j, image in enumerate(large):
                x = left + j * pitch
                assert np.array_equal(page[top : top + height, x : x + width], image)
                assert (page[top : top + height, x - 1] == 255).all()
                assert (page[top - 1, x : x + width] == 255).all()


def find(page: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """Top and left of the only place where the image is on the page."""
    height, width, _ = image.shape
    candidates = (page[: 1 - height, : 1 - width] == image[0, 0]).all(axis=2)
    rows, columns = candidates.shape
    for y, x in ((0, width - 1), (height - 1, 0), (height - 1, width - 1)):
        candidates &= (page[y : y + rows, x : x + columns] == image[y, x]).all(axis=2)
    places = [
        (y, x)
        for y, x in zip(*candidates.nonzero(), strict=True)
        if np.array_equal(page[y : y + height, x : x + width], image)
    ]
    assert len(places) == 1
    return places[0]


def test_patch_statistics_of_the_original_are_put_back(build):
    """A prediction of zeros becomes the mean of each masked patch, over all its channels."""
    model = build(norm_pix_loss=True)
    torch.nn.init.zeros_(model.decoder_pred.weight)
    imgs = normalize(draw_pixels((32, 32)))
    result = reconstruct(model, imgs, draw_noise(model, 2, 0), 0.75, 0.75)
    means = patchify(imgs, 8).mean(-1)
    drawn = patchify(result.pixels, 8)
    for i, patch in result.predicted.nonzero().tolist():
        assert torch.allclose(drawn[i, patch], means[i, patch].expand(192), atol=1e-6)


def test_the_model_is_asked_as_training_asks_it(build):
    model = build()
    imgs, noise = normalize(draw_pixels((32, 32))), draw_noise(model, 2, 5)
    result = reconstruct(model, imgs, noise, 0.75, 0.75)
    with torch.no_grad():
        loss, pred, _, mask = model(imgs, vis=True, noise=noise)
    assert result.loss == loss.item()
    assert torch.equal(result.predicted, mask.bool())
    assert not (result.predicted & result.visible).any()
    assert torch.equal(result.pixels, model.unpatchify(pred))


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_channels_other_than_three(channels, shown):
    pixels = draw_pixels((8, 8), channels=channels)
    mean, std = [0.4] * channels, [0.3] * channels
    drawn = to_rgb((pixels / 255 - 0.4) / 0.3, mean, std)
    assert np.array_equal(drawn, pixels[:, shown].permute(0, 2, 3, 1))


def test_values_beyond_black_and_white_are_clipped():
    drawn = to_rgb(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2), [0.5], [0.5])
    assert drawn[0, 0].tolist() == [[0] * 3, [255] * 3]


def options_of(**changes) -> Namespace:
    return Namespace(**(dict(mean=MEAN, std=STD, mask_ratio=0.75, kept_mask_ratio=0.75) | changes))


def texts_of(figure) -> str:
    """The text of a figure outside its axes, line breaks as spaces."""
    return " ".join(text.get_text() for text in figure.texts)


def texts_in(artists) -> list[str]:
    return [text.get_text() for text in artists]


def test_reconstructions(build):
    """Deterministic, no change of the model or the random state, one block of rows per ratio."""
    model = build(norm_pix_loss=True)
    model.train()
    imgs = normalize(draw_pixels((32, 32)))
    torch.manual_seed(4)
    first = figure_to_array(draw_reconstructions(model, imgs, options_of(), seed=1))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(4)))
    assert first.dtype == np.uint8 and first.ndim == 3 and len(first) == 3
    assert model.training and all(p.grad is None for p in model.parameters())
    again, other = (
        figure_to_array(draw_reconstructions(model, imgs, options_of(), seed=s)) for s in (1, 2)
    )
    assert np.array_equal(again, first) and not np.array_equal(other, first)
    figure = draw_reconstructions(model, imgs, options_of(), mask_ratios=[0.5, 0.75])
    assert figure_to_array(figure).shape[1] > 1.7 * first.shape[1]
    assert "Mask ratio 0.5: 8 of 16 patches visible, 8 predicted; loss" in texts_of(figure)
    assert "Mask ratio 0.75: 4 of 16 patches visible, 12 predicted; loss" in texts_of(figure)


def test_captions(tiny_cross):
    """What a reader has to know, and only then; nothing else unless it is given."""
    model = tiny_cross()
    imgs = normalize(draw_pixels((32, 32)))
    text = texts_of(draw_reconstructions(model, imgs, options_of()))
    assert all(title.replace("\n", " ") in text for title in COLUMNS)
    assert "mean and contrast" not in text and "not predicted" not in text
    assert text.endswith("Gray: masked patches and, beside the prediction, the visible ones.")
    model.norm_pix_loss = True
    figure = draw_reconstructions(model, imgs, options_of(), None, 0.25, caption="Mine, $5 to $6.")
    text = texts_of(figure)
    assert "norm_pix_loss" in text and "mean and contrast of each patch are taken from" in text
    assert "4 of 16 patches visible, 4 predicted" in text
    assert r"Mine, \$5 to \$6. Gray: " in text and "Light gray: masked patches that are not" in text


def test_predicted_fraction_follows_the_checkpoint(tiny_cross):
    """Trained on 0.75 / 0.375, mask ratio 0.5 predicts 0.25 of all 16 patches, unless told."""
    model = tiny_cross()
    calls = []
    forward = model.forward

    def watch(imgs, mask_ratio, kept_mask_ratio, **options):
        calls.append((mask_ratio, kept_mask_ratio))
        return forward(imgs, mask_ratio, kept_mask_ratio, **options)

    model.forward = watch
    imgs, args = normalize(draw_pixels((32, 32))), options_of(kept_mask_ratio=0.375)
    draw_reconstructions(model, imgs, args)
    draw_reconstructions(model, imgs, args, [0.5])
    draw_reconstructions(model, imgs, args, [0.5, 0.75], 0.5)
    assert calls == [(0.75, 0.375), (0.5, 0.25), (0.5, 0.5), (0.75, 0.5)]
    with pytest.raises(ValueError, match="exceeds mask_ratio"):
        draw_reconstructions(model, imgs, args, [0.5], 0.75)


def test_higher_ratios_mask_more_of_the_same(build):
    model = build()
    imgs, noise = normalize(draw_pixels((32, 32))), draw_noise(model, 2, 0)
    some, few = (reconstruct(model, imgs, noise, ratio, ratio).visible for ratio in (0.5, 0.75))
    assert (few <= some).all() and few.sum() < some.sum()


def test_mae_refuses_kept_mask_ratio(tiny_mae):
    with pytest.raises(ValueError, match="belongs to CrossMAE"):
        draw_reconstructions(tiny_mae(), torch.zeros(1, 3, 32, 32), options_of(), None, 0.25)


# Attention.


def test_attention_is_the_modules_own(build):
    """Written-out weights times v, through the module's projection, give the module's output."""
    model = build()
    imgs, noise = normalize(draw_pixels((32, 32))), draw_noise(model, 2, 0)
    blocks = model.decoder_blocks
    layers = [x.cross_attn if model.kind == "crossmae" else x.attn for x in blocks]
    parts = [m for layer in layers for m in layer.children() if isinstance(m, torch.nn.Linear)]
    with catch_outputs(layers + parts) as outputs, torch.no_grad():
        model(imgs, noise=noise)
        for layer in layers:
            weights = attention_weights(layer, outputs, model.kind == "crossmae")
            packed = outputs[layer.kv if model.kind == "crossmae" else layer.qkv]
            v = packed[..., -16:].unflatten(2, (2, 8)).transpose(1, 2)  # v comes last: (B, H, M, d)
            assert weights.shape[1] == 2
            expected = layer.proj((weights @ v).transpose(1, 2).flatten(2))
            assert torch.allclose(outputs[layer], expected, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_sum_to_one_and_the_model_stays_as_it_is(build):
    model = build(self_attn=True) if build().kind == "crossmae" else build()
    imgs, noise = normalize(draw_pixels((32, 32))), draw_noise(model, 2, 0)
    with torch.no_grad():
        before = model(imgs, noise=noise)
        attention = read_attention(model, imgs, noise, 0.75, 0.75)
        after = model(imgs, noise=noise)
    assert torch.equal(before, after)
    assert attention.weights.shape == (2, 2, 12, 17)  # J, B, P, 1 + L
    assert torch.allclose(attention.weights.sum(-1), torch.ones(2, 2, 12), atol=1e-6)
    assert torch.allclose(attention.mass.sum(0), torch.ones(2), atol=1e-6)


def test_weights_are_at_their_patches(tiny_cross, tiny_mae):
    """One head, one block: end to end from the weights as returned to the module's output."""
    small = dict(decoder_num_heads=1, decoder_depth=1)
    imgs = normalize(draw_pixels((32, 32)))
    for model, mask_ratio in ((tiny_cross(**small), 0.5), (tiny_mae(**small), 0.75)):
        noise = draw_noise(model, 2, 0)
        is_cross = model.kind == "crossmae"
        kept = mask_ratio / 2 if is_cross else mask_ratio
        attention = read_attention(model, imgs, noise, mask_ratio, kept)
        block = model.decoder_blocks[0]
        layer = block.cross_attn if is_cross else block.attn
        packed_by = layer.kv if is_cross else layer.qkv
        with catch_outputs([layer, packed_by]) as outputs, torch.no_grad():
            model(imgs, mask_ratio, kept, noise=noise)
        for i in range(2):
            num_visible, num_predicted = int(16 * (1 - mask_ratio)), int(16 * kept)
            order = noise[i].argsort().tolist()
            wanted = sorted(order[16 - num_predicted :])
            assert attention.ids_pred[i].tolist() == wanted
            assert attention.visible[i].nonzero().flatten().tolist() == sorted(order[:num_visible])
            tokens = order[:num_visible] if is_cross else list(range(16))
            weights = attention.weights[0, i][:, [0] + [1 + patch for patch in tokens]]
            expected = layer.proj(weights @ outputs[packed_by][i][:, -16:])
            rows = outputs[layer][i] if is_cross else outputs[layer][i][[1 + p for p in wanted]]
            assert torch.allclose(rows, expected, atol=1e-6)
            if is_cross:
                masked = [1 + patch for patch in order[num_visible:]]
                assert (attention.weights[0, i][:, masked] == 0).all()


def test_mass_is_the_sum_over_its_patches(tiny_mae):
    model = tiny_mae()
    imgs, noise = normalize(draw_pixels((32, 32))), draw_noise(model, 2, 0)
    attention = read_attention(model, imgs, noise, 0.75, 0.75)
    visible = [sets_of(row, 4, 12)[0] for row in noise.tolist()]
    for j in range(2):
        sums = {"visible": 0.0, "masked": 0.0, "class token": 0.0}
        for i in range(2):
            for row in attention.weights[j, i].tolist():
                sums["class token"] += row[0]
                for patch, weight in enumerate(row[1:]):
                    sums["visible" if patch in visible[i] else "masked"] += weight
        expected = [sums[name] / (2 * 12) for name in ("visible", "masked", "class token")]
        assert attention.mass[:, j].tolist() == pytest.approx(expected, abs=1e-5)


def test_attention_figure(build):
    """Each map, its color limits, its frame and the summary against read_attention."""
    model = build()
    is_cross = model.kind == "crossmae"
    imgs = normalize(draw_pixels((32, 32)))
    figure = draw_attention(model, imgs, options_of(), num_patches=3)
    expected = read_attention(model, imgs, draw_noise(model, 2, 0), 0.75, 0.75)
    summary, *rows = (axes for axes in figure.axes if axes.images)
    assert np.allclose(summary.images[0].get_array(), expected.mass)
    assert summary.images[0].get_clim() == (0, 1)
    assert texts_in(summary.texts) == [f"{x:.2f}" for x in expected.mass.ravel()]
    assert texts_in(summary.get_yticklabels()) == ["visible", "masked", "class token"]
    assert texts_in(summary.get_xticklabels()) == ["block 1", "block 2"]
    bars = [axes for axes in figure.axes if not axes.images]
    assert len(bars) == 1 + 2 * 3 and len(rows) == 2 * 3 * 3  # images, patches, masked + 2 blocks
    for i in range(2):
        for j, place in enumerate((2, 6, 10)):  # spread over 12 predicted patches
            tiles = rows[9 * i + 3 * j : 9 * i + 3 * j + 3]
            weights = expected.weights[:, i, place, 1:]
            for tile, values in zip(tiles[1:], weights, strict=True):
                drawn = tile.images[0].get_array().ravel()
                assert np.allclose(drawn.filled(0), values)
                unread = np.ma.getmaskarray(drawn)
                assert np.array_equal(unread, ~expected.visible[i] if is_cross else unread & False)
                assert tile.images[0].get_clim() == (0, pytest.approx(weights.max().item()))
            bar = bars[1 + 3 * i + j]
            assert bar.get_ylim() == (0, pytest.approx(weights.max().item()))
            for tile in tiles:
                frame = tile.patches[0].get_bbox()
                row, column = divmod(expected.ids_pred[i, place].item(), 4)
                assert ((frame.p0 + frame.p1) / 2).tolist() == pytest.approx([column, row])
    assert ("does not attend to" in texts_of(figure)) == is_cross
    assert COLORS.get_bad()[:3] == pytest.approx([GRAY / 255] * 3)


@pytest.mark.parametrize("size", SIZES)
def test_parts_of_figures_do_not_overlap(build, size):
    """Images, maps and color bars of two images and two ratios; nothing sticks out of the page."""
    model = build(img_size=size)
    args = Namespace(mean=MEAN, std=STD, mask_ratio=0.75, kept_mask_ratio=0.75)
    imgs = torch.randn(2, 3, *size)
    for draw in (draw_reconstructions, draw_attention):
        figure = draw(model, imgs, args, mask_ratios=[0.5, 0.75])
        assert_axes_do_not_overlap(figure)
        assert len(figure.axes) > 8
    if model.kind == "crossmae":
        assert_axes_do_not_overlap(draw_feature_map_weights(model))


@pytest.mark.parametrize("size", SIZES)
def test_attention_figure_of_many_blocks(tiny_cross, size):
    model = tiny_cross(decoder_depth=12, self_attn=True, img_size=size)
    figure = draw_attention(
        model, normalize(draw_pixels(size)), options_of(), [0.5, 0.75], num_patches=1
    )
    assert figure.get_figwidth() < 8  # inches
    text = texts_of(figure)
    assert "Mask ratio 0.5: " in text and "self-attention between predicted patches" in text


# Heat maps, text and files.


def test_heat_map():
    """Exact cells of the map's colors, numbers only while they fit, in readable ink."""
    values = np.array([[0.5, -1.0, 0.0], [0.0, 1.0, -0.5]])
    texts = np.array([[f"{x:.1f}" for x in row] for row in values])
    options = dict(label="x", texts=texts, cmap="RdBu_r", vmin=-1, vmax=1)
    figure = new_figure()
    axes = add_heat_map(figure, values, 0, 0, 30, 20, ("ab", "123"), **options)
    page = figure_to_array(fit(figure)).transpose(1, 2, 0)
    colors = (axes.images[0].to_rgba(values, bytes=True)[..., :3]).repeat(20, 0).repeat(30, 1)
    inside = np.s_[3:-3, 3:-3]  # the frame is drawn over the edge
    find(page, colors[inside])
    for cell, fits in (((100, 40), True), ((40, 40), False), ((100, 20), False)):
        figure = new_figure()
        axes = add_heat_map(figure, values, 0, 0, *cell, (None, None), **options)
        assert texts_in(axes.texts) == (texts.ravel().tolist() if fits else [])
        if fits:
            inks = ["black", "white", "black", "black", "white", "black"]
            assert [x.get_color() for x in axes.texts] == inks


def test_feature_map_weights(tiny_cross, tiny_mae):
    model = tiny_cross(depth=3)
    figure = draw_feature_map_weights(model, "Mine.")
    axes, bar = figure.axes
    weights = model.wfm.linear.weight.detach()  # 2 decoder blocks, input and 3 maps
    limit = weights.abs().max().item()
    assert np.allclose(axes.images[0].get_array(), weights)
    assert axes.images[0].get_clim() == pytest.approx((-limit, limit))
    assert bar.get_ylim() == pytest.approx((-limit, limit))
    assert texts_in(axes.get_xticklabels()) == ["0", "1", "2", "3"]
    assert texts_in(axes.get_yticklabels()) == ["1", "2"]
    numbers = [float(x.get_text().replace("\N{MINUS SIGN}", "-")) for x in axes.texts]
    assert numbers == pytest.approx(weights.flatten().tolist(), abs=0.0051)
    assert texts_of(figure) == "Mine."
    some = draw_feature_map_weights(tiny_cross(depth=3, use_input=False, use_fm=[0, -1])).axes[0]
    assert texts_in(some.get_xticklabels()) == ["1", "3"]
    assert not draw_feature_map_weights(tiny_cross(depth=40)).axes[0].texts
    for other in (tiny_mae(), tiny_cross(weight_fm=False, use_input=False)):
        with pytest.raises(ValueError, match="--weight_fm"):
            draw_feature_map_weights(other)


def test_long_texts_are_wrapped_and_not_cut():
    text = "one line of text that is far too long for the figure " * 3
    lines = wrap(text, 10).splitlines()
    assert " ".join(lines) == " ".join(text.split()) and len(lines) == 3
    assert wrap("x" * 200, 10) == "x" * 200  # a long path stays whole
    figure = new_figure()
    add_axes(figure, 0, 0, 20, 20)
    page = figure_to_array(fit(figure, "x" * 200))
    assert (page[:, :, :8] == 255).all() and (page[:, :, -8:] == 255).all()


def test_text_is_no_mathematics():
    assert plain("a$b$ \udcff") == r"a\$b\$ ?"


@pytest.mark.parametrize("suffix", FORMATS)
def test_equal_figures_give_equal_files(tmp_path, build, suffix):
    model, imgs = build(), normalize(draw_pixels((32, 32)))
    for name in "ab":
        figure = draw_reconstructions(model, imgs, options_of(), caption="A caption")
        save_figure(figure, tmp_path / f"{name}{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert data == (tmp_path / f"b{suffix}").read_bytes()
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix]
    assert data.startswith(start) and (suffix != ".svg" or b"<svg" in data)


# The command.


def write_checkpoint(path: Path, kind: str = "cross", **changes) -> Path:
    """A file as main_pretrain.py or main_finetune.py writes it, untrained."""
    from util.build import build_classifier, build_pretrain_model

    args = dict(
        model="mae_vit_mini_patch4",
        input_size=16,
        patch_size=None,
        in_chans=3,
        mean=MEAN,
        std=STD,
        cross_mae=kind == "cross",
        decoder_depth=1,
        decoder_embed_dim=None,
        weight_fm=kind == "cross",
        use_fm=[-1],
        use_input=False,
        self_attn=False,
        mask_ratio=0.75,
        kept_mask_ratio=0.75,
        norm_pix_loss=True,
        grad_checkpointing=False,
        recompute="none",
    )
    if kind == "fine-tuned":
        args |= dict(model="vit_mini_patch4", nb_classes=5, drop_path=0.0, global_pool=True)
    args |= changes
    build = build_classifier if kind == "fine-tuned" else build_pretrain_model
    weights = build(Namespace(**args)).state_dict()
    if kind == "encoder":
        torch.save(
            {k: v for k, v in weights.items() if not k.startswith(("decoder", "mask"))}, path
        )
    else:
        torch.save({"model": weights, "args": args}, path)
    return path


def draw(*flags) -> None:
    visualize.main(visualize.get_args_parser().parse_args([str(flag) for flag in flags]))


def test_command(tmp_path, image_folder):
    """In a process of its own, as a user runs it, on a folder and a file."""
    checkpoint = write_checkpoint(tmp_path / "c.pth", input_size=[16, 32])
    out = tmp_path / "deep" / "grid.png"
    command = ["-m", "tools.visualize", "--checkpoint", checkpoint, "--out", out]
    command += ["--images", image_folder / "val", image_folder / "train/a/0.jpg", "--device", "cpu"]
    done = run_python(*command, "--num_images", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(out) in done.stdout
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width == 4 * 320 + 3 * 16 + 2 * 16
        assert image.height > 3 * 160


@pytest.mark.parametrize("flags", [["--weights"], ["--attention", "--num_patches", 2]])
@pytest.mark.parametrize("suffix", [".png", ".PDF", ".svg"])
def test_other_modes_and_formats(tmp_path, image_folder, flags, suffix):
    checkpoint = write_checkpoint(tmp_path / "c.pth")
    out = tmp_path / f"figure{suffix}"
    images = [] if "--weights" in flags else ["--images", image_folder / "val/a/0.jpg"]
    draw("--checkpoint", checkpoint, "--out", out, *images, *flags)
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix.lower()]
    assert out.read_bytes().startswith(start)


def test_captions_of_the_command(tmp_path, monkeypatch):
    """The path of the checkpoint is not drawn, --caption is."""
    figures = []
    monkeypatch.setattr(visualize, "save_figure", lambda figure, out: figures.append(figure))
    checkpoint = write_checkpoint(tmp_path / "c.pth")
    draw("--checkpoint", checkpoint, "--weights", "--out", "x.png")
    draw("--checkpoint", checkpoint, "--weights", "--out", "x.png", "--caption", "Mine.")
    assert [texts_of(figure) for figure in figures] == ["", "Mine."]


def test_gray_images_are_drawn_gray(tmp_path, image_folder):
    checkpoint = write_checkpoint(tmp_path / "c.pth", "mae", in_chans=1, mean=[0.5], std=[0.5])
    out = tmp_path / "grid.png"
    draw("--checkpoint", checkpoint, "--images", image_folder / "val", "--out", out)
    red, green, blue = np.asarray(Image.open(out).convert("RGB")).astype(int).transpose(2, 0, 1)
    assert (red == green).all() and (green == blue).all()


def test_comparison(tiny_cross, tiny_mae):
    """Columns are those of each model's own figure, for the same masks and all masked patches."""
    imgs = normalize(draw_pixels((32, 32)))
    pairs = [(tiny_cross(), options_of(kept_mask_ratio=0.25)), (tiny_mae(), options_of())]
    figure = draw_comparison(pairs, imgs, 0.5, seed=3)
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert len(images) == 4 * len(imgs)
    columns = [np.stack(images[i : i + len(imgs)]) for i in range(0, len(images), len(imgs))]
    noise = draw_noise(pairs[0][0], len(imgs), 3)
    for j, (model, args) in enumerate(pairs):
        alone = reconstruction_columns(
            imgs, reconstruct(model, imgs, noise, 0.5, 0.5), (4, 4), args.mean, args.std
        )
        for found, expected in ((0, 0), (1, 1), (2 + j, 3)):
            assert np.array_equal(columns[found], alone[expected])
    assert not np.array_equal(columns[2], columns[3])
    text = texts_of(figure)
    assert "CrossMAE kept 0.25" in text and "MAE" in text and "Light gray" not in text
    assert_axes_do_not_overlap(figure)
    for args, model, name in (
        (options_of(mean=[0.1] * 3), tiny_mae(), "with mean"),
        (options_of(), tiny_mae(norm_pix_loss=True), "norm_pix_loss"),
        (options_of(), tiny_mae(patch_size=16), "patch grid"),
    ):
        with pytest.raises(UserError, match=f"{name} .* cannot be compared"):
            draw_comparison([pairs[0], (model, args)], imgs)


def test_comparison_command(tmp_path, image_folder):
    paths = [write_checkpoint(tmp_path / f"{kind}.pth", kind) for kind in ("cross", "mae")]
    out = tmp_path / "both.png"
    draw("--checkpoint", paths[0], "--compare", paths[1], "--images", image_folder, "--out", out)
    with Image.open(out) as image:
        assert image.width == 4 * 320 + 3 * 16 + 2 * 16


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("fine-tuned", [], "fine-tuned classifier, which predicts no pixels"),
        ("encoder", [], "main_pretrain.py"),
        ("mae", ["--kept_mask_ratio", 0.25], "belongs to CrossMAE"),
        ("mae", ["--num_patches", 2], "--num_patches belongs to --attention"),
        ("mae", ["--num_images", 0], "--num_images is 0"),
        ("mae", ["--mask_ratio", 1.5], "mask_ratio is 1.5"),
    ],
)
def test_refusals(tmp_path, image_folder, kind, flags, message):
    checkpoint = write_checkpoint(tmp_path / "c.pth", kind)
    out = tmp_path / "grid.png"
    with pytest.raises(ValueError, match=message) as caught:
        draw("--checkpoint", checkpoint, "--images", image_folder, "--out", out, *flags)
    assert isinstance(caught.value, CheckpointError) == (kind in ("fine-tuned", "encoder"))
    assert not out.exists()


def test_refusals_before_anything_is_read(tmp_path):
    for flags, message in (
        (["--out", "x.jpg"], "x.jpg; it must end in .png, .pdf, .svg"),
        (["--out", "x"], "must end in"),
        (["--out", "x.png", "--weights", "--images", "y"], "leave out --images"),
        (["--out", "x.png", "--weights", "--mask_ratio", 0.5], "leave out --mask_ratio"),
        (["--out", "x.png", "--attention", "--num_patches", 0], "at least 1"),
        (["--out", "x.png", "--images", "y", "--compare", "z", "--kept_mask_ratio", 0.2], "all m"),
    ):
        with pytest.raises(ValueError, match=message):
            draw("--checkpoint", "none", *flags)


def test_predictions_of_gray_images_have_no_tint():
    """The mean of the predicted channels for a gray image, the prediction itself for another."""
    torch.manual_seed(0)
    imgs = torch.rand(2, 3, 8, 8)
    imgs[0] = imgs[0, :1]
    pixels = torch.rand(2, 3, 8, 8)
    masks = torch.tensor([[True, False, False, False]] * 2)
    result = Reconstruction(pixels, masks, ~masks, 0.0)
    columns = reconstruction_columns(imgs, result, (2, 2), [0.0] * 3, [1.0] * 3)
    predicted = (pixels * 255).round().permute(0, 2, 3, 1).numpy()
    shown = columns[3][:, :, 4:]  # patches that are predicted
    assert (shown[0] == predicted[0, :, 4:].mean(-1, keepdims=True).round()).all()
    assert (shown[1] == predicted[1, :, 4:]).all()


def test_choice_of_images(tmp_path, image_folder):
    args = options_of(input_size=32, in_chans=3, mean=[0.5] * 3, std=[0.5] * 3)
    everything = visualize.load_images([str(image_folder)], 99, args)
    assert len(everything) == 16
    assert visualize.load_images([str(image_folder)], 4, args).equal(everything[::4])
    with pytest.raises(UserError, match="There is no image in"):
        visualize.load_images([str(tmp_path)], 8, args)
    with pytest.raises(UserError, match="--images"):
        draw("--checkpoint", "none", "--out", "x.png")
    with pytest.raises(UserError, match="--num_images is 0; it must be at least 1"):
        draw("--checkpoint", "none", "--out", "x.png", "--images", "x", "--num_images", 0)


# TensorBoard.


class FakeWriter:
    def __init__(self):
        self.images = {}

    def add_image(self, name, image, step):
        assert image.dtype == np.uint8 and image.ndim == 3 and len(image) == 3
        self.images.setdefault(name, []).append((step, image))


class FakeLoader:
    """10 images of 8-bit noise."""

    def __init__(self):
        pixels = draw_pixels((32, 32), 10)
        self.dataset = FakeDataset(pixels)

    def prepare(self, imgs):
        return normalize(imgs)


class FakeDataset:
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, key):
        epoch, index = key
        assert epoch == 0
        return self.pixels[index], 0


def test_image_log(build):
    """The same figures as those of the command, of the same images, about 20 times."""
    model, writer, loader = build(), FakeWriter(), FakeLoader()
    args = options_of(log_images=3, epochs=41)
    log = ImageLog(args, writer, loader)
    assert torch.equal(log.imgs, normalize(loader.dataset.pixels[[0, 3, 6]]))
    for epoch in (0, 1, 2, 40):
        log.show(model, epoch)
    names = {"reconstructions", "attention"} | ({"feature_map_weights"} & {has_weights(model)})
    assert set(writer.images) == names
    expected = figure_to_array(draw_reconstructions(model, log.imgs, args))
    for _, image in writer.images["reconstructions"]:
        assert np.array_equal(image, expected)
    assert [step for step, _ in writer.images["attention"]] == [999, 2999, 40999]
    expected = figure_to_array(draw_attention(model, log.imgs[:1], args))
    assert np.array_equal(writer.images["attention"][0][1], expected)


def test_image_log_of_compiled_blocks(build, caplog):
    """Hooks do not run in compiled blocks: they are drawn uncompiled, and stay compiled."""
    plain, model = build(), build()
    compile_model(model, backend="eager")
    writer, loader, args = FakeWriter(), FakeLoader(), options_of(log_images=3, epochs=41)
    model(normalize(loader.dataset.pixels[:2]))
    ImageLog(args, writer, loader).show(model, 0)
    assert "failed" not in caplog.text
    log = ImageLog(args, FakeWriter(), loader)
    expected = figure_to_array(draw_attention(plain, log.imgs[:1], args))
    assert np.array_equal(writer.images["attention"][0][1], expected)
    assert all(block._compiled_call_impl for block in model.blocks)


def test_a_failing_figure_is_a_warning(build, monkeypatch, caplog):
    writer, args = FakeWriter(), options_of(log_images=3, epochs=41)
    log = ImageLog(args, writer, FakeLoader())
    monkeypatch.setattr(log, "draw", lambda model: 1 / 0)
    log.show(build(), 0)
    assert "--log_images failed, training continues" in caplog.text and not writer.images


def has_weights(model) -> str:
    return "feature_map_weights" if model.kind == "crossmae" else ""


def test_matplotlib_is_not_imported_by_training():
    """Only --log_images and --report need it."""
    code = "import sys, main_pretrain, main_finetune; sys.exit('matplotlib' in sys.modules)"
    assert run_python("-c", code).returncode == 0
    log = ImageLog(options_of(log_images=0, epochs=1), FakeWriter(), None)
    log.show(None, 0)  # nothing is drawn
    assert not log.writer
