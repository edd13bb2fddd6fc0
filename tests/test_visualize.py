"""tools/visualize.py and what it draws with: true colours, exact masks, attention and weights."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from tools import visualize
from util.io.errors import CheckpointError, UserError
from util.layers.patchify import patchify
from util.vis.attention_maps import (
    attention_grid,
    attention_weights,
    catch_outputs,
    read_attention,
)
from util.vis.figures import (
    GREY,
    HATCH,
    HEAT,
    SIGNED,
    Page,
    enlarge,
    heat_map,
    text_width,
    to_rgb,
    wrap,
)
from util.vis.reconstruction import (
    draw_noise,
    feature_map_weights,
    reconstruct,
    reconstruction_columns,
    reconstruction_grid,
)

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
SIZES = [(32, 32), (16, 48)]


@pytest.fixture(params=["cross", "mae"])
def build(request, tiny_cross, tiny_mae):
    return {"cross": tiny_cross, "mae": tiny_mae}[request.param]


def draw_pixels(size: tuple[int, int], number: int = 2, channels: int = 3) -> torch.Tensor:
    """Random pictures, uint8."""
    generator = torch.Generator().manual_seed(1)
    shape = (number, channels, *size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def make_perfect(model, imgs: torch.Tensor) -> None:
    """Let the decoder return the very target that its loss compares with."""
    is_cross = hasattr(model.decoder_blocks[0], "cross_attn")

    def forward_decoder(context, masking):
        every = torch.arange(model.patch_embed.num_patches).expand(len(imgs), -1)
        return model.pixel_target(imgs, masking.ids_pred if is_cross else every)

    model.forward_decoder = forward_decoder


def sets_of(noise: list[float], num_visible: int, num_predicted: int) -> tuple[set, set]:
    """Visible and predicted patches of one picture, by sorting."""
    order = sorted(range(len(noise)), key=noise.__getitem__)
    return set(order[:num_visible]), set(order[len(order) - num_predicted :])


def blocks_of(picture: torch.Tensor, side: int) -> list[np.ndarray]:
    """The patches of a picture (3, H, W) in raster order, by slicing."""
    picture = picture.numpy()
    _, height, width = picture.shape
    return [
        picture[:, y : y + side, x : x + side]
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def columns_of(model, imgs, noise, mask_ratio=0.75, kept_mask_ratio=0.75, factor=1):
    result = reconstruct(model, imgs, noise, mask_ratio, kept_mask_ratio)
    grid = model.patch_embed.grid_size
    return reconstruction_columns(imgs, result, grid, MEAN, STD, factor), result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_back_the_picture(build, norm_pix_loss, size):
    model = build(norm_pix_loss=norm_pix_loss, img_size=size)
    pixels = draw_pixels(size)
    imgs = normalised(pixels)
    make_perfect(model, imgs)
    (original, masked, predicted, pasted), result = columns_of(model, imgs, draw_noise(model, 2, 3))
    assert result.loss == pytest.approx(0, abs=1e-10)
    assert torch.equal(original, pixels)
    assert (pasted.int() - pixels.int()).abs().max() <= 1
    noise = draw_noise(model, 2, 3).tolist()
    num_patches = len(noise[0])
    for i in range(2):
        visible, _ = sets_of(noise[i], num_patches // 4, num_patches - num_patches // 4)
        for patch, (whole, seen, guess) in enumerate(
            zip(*(blocks_of(x[i], 8) for x in (pixels, masked, predicted)), strict=True)
        ):
            if patch in visible:
                assert np.array_equal(seen, whole) and (guess == GREY).all()
            else:
                assert (seen == GREY).all()
                assert np.abs(guess.astype(int) - whole.astype(int)).max() <= 1


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_unpredicted_patches_are_hatched(tiny_cross, norm_pix_loss):
    """16 patches, ratios 0.75 / 0.25: 4 visible, 4 predicted, 8 neither."""
    model = tiny_cross(norm_pix_loss=norm_pix_loss)
    pixels = draw_pixels((32, 32))
    imgs = normalised(pixels)
    make_perfect(model, imgs)
    noise = draw_noise(model, 2, 0)
    (_, masked, predicted, pasted), _ = columns_of(model, imgs, noise, 0.75, 0.25, factor=2)
    for i in range(2):
        visible, wanted = sets_of(noise[i].tolist(), 4, 4)
        whole = blocks_of(enlarge(pixels[i], 2), 16)
        parts = [blocks_of(x[i], 16) for x in (masked, predicted, pasted)]
        for patch, (seen, guess, both) in enumerate(zip(*parts, strict=True)):
            if patch in visible | wanted:
                assert np.abs(both.astype(int) - whole[patch].astype(int)).max() <= 1
            else:
                assert (seen == GREY).all()
                for picture in (guess, both):
                    assert set(np.unique(picture)) == set(HATCH)
                    assert np.array_equal(picture[0], picture[1])  # grey
                    diagonal = np.lib.stride_tricks.sliding_window_view(picture[0], (2, 2))
                    assert (diagonal[..., 0, 1] == diagonal[..., 1, 0]).all()


def test_patch_statistics_of_the_original_are_put_back(build):
    """A prediction of zeros becomes the mean of each hidden patch, over all its channels."""
    model = build(norm_pix_loss=True)
    torch.nn.init.zeros_(model.decoder_pred.weight)
    imgs = normalised(draw_pixels((32, 32)))
    result = reconstruct(model, imgs, draw_noise(model, 2, 0), 0.75, 0.75)
    means = patchify(imgs, 8).mean(-1)
    drawn = patchify(result.pixels, 8)
    for i, patch in result.predicted.nonzero().tolist():
        assert torch.allclose(drawn[i, patch], means[i, patch].expand(192), atol=1e-6)


def test_the_model_is_asked_as_training_asks_it(build):
    model = build()
    imgs, noise = normalised(draw_pixels((32, 32))), draw_noise(model, 2, 5)
    result = reconstruct(model, imgs, noise, 0.75, 0.75)
    with torch.no_grad():
        loss, pred, _, mask = model(imgs, vis=True, noise=noise)
    assert result.loss == loss.item()
    assert torch.equal(result.predicted, mask.bool())
    assert not (result.predicted & result.visible).any()
    assert torch.equal(result.pixels, model.unpatchify(pred))


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_channels_that_are_not_three(channels, shown):
    pixels = draw_pixels((8, 8), channels=channels)
    mean, std = [0.4] * channels, [0.3] * channels
    assert torch.equal(to_rgb((pixels / 255 - 0.4) / 0.3, mean, std), pixels[:, shown])


def test_values_beyond_black_and_white_are_cut():
    assert to_rgb(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2), [0.5], [0.5])[0, 0].tolist() == [
        [0, 255]
    ]


def options_of(**changes) -> Namespace:
    return Namespace(**(dict(mean=MEAN, std=STD, mask_ratio=0.75, kept_mask_ratio=0.75) | changes))


def test_grid_for_tensorboard(build):
    model = build(norm_pix_loss=True)
    model.train()
    imgs = normalised(draw_pixels((32, 32)))
    torch.manual_seed(4)
    first = reconstruction_grid(model, imgs, options_of(), seed=1)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(4)))
    assert first.dtype == torch.uint8 and first.ndim == 3 and len(first) == 3
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(reconstruction_grid(model, imgs, options_of(), seed=1), first)
    assert not torch.equal(reconstruction_grid(model, imgs, options_of(), seed=2), first)
    blocks = reconstruction_grid(model, imgs, options_of(), mask_ratios=[0.5, 0.75])
    assert blocks.shape[1] > 1.7 * first.shape[1]
    # the line about patch statistics is there, and only then
    model.norm_pix_loss = False
    assert reconstruction_grid(model, imgs, options_of(), seed=1).shape[1] < first.shape[1]


def test_share_predicted_follows_the_checkpoint(tiny_cross):
    """Trained on 0.75 / 0.375, mask ratio 0.5 predicts 0.25 of all 16 patches, unless told."""
    model = tiny_cross()
    calls = []
    forward = model.forward

    def watch(imgs, mask_ratio, kept_mask_ratio, **options):
        calls.append((mask_ratio, kept_mask_ratio))
        return forward(imgs, mask_ratio, kept_mask_ratio, **options)

    model.forward = watch
    imgs, args = normalised(draw_pixels((32, 32))), options_of(kept_mask_ratio=0.375)
    reconstruction_grid(model, imgs, args)
    reconstruction_grid(model, imgs, args, [0.5])
    reconstruction_grid(model, imgs, args, [0.5, 0.75], 0.5)
    assert calls == [(0.75, 0.375), (0.5, 0.25), (0.5, 0.5), (0.75, 0.5)]
    with pytest.raises(ValueError, match="exceeds mask_ratio"):
        reconstruction_grid(model, imgs, args, [0.5], 0.75)


def test_higher_ratios_hide_more_of_the_same(build):
    model = build()
    imgs, noise = normalised(draw_pixels((32, 32))), draw_noise(model, 2, 0)
    some, few = (reconstruct(model, imgs, noise, ratio, ratio).visible for ratio in (0.5, 0.75))
    assert (few <= some).all() and few.sum() < some.sum()


def test_mae_refuses_a_part(tiny_mae):
    with pytest.raises(ValueError, match="belongs to CrossMAE"):
        reconstruction_grid(tiny_mae(), torch.zeros(1, 3, 32, 32), options_of(), None, 0.25)


# Attention.


def test_attention_is_the_modules_own(build):
    """Written-out weights times v, through the module's projection, give the module's output."""
    model = build()
    imgs, noise = normalised(draw_pixels((32, 32))), draw_noise(model, 2, 0)
    blocks = model.decoder_blocks
    layers = [getattr(block, "cross_attn", None) or block.attn for block in blocks]
    parts = [m for layer in layers for m in layer.children() if isinstance(m, torch.nn.Linear)]
    with catch_outputs(layers + parts) as outputs, torch.no_grad():
        model(imgs, noise=noise)
        for layer in layers:
            weights = attention_weights(layer, outputs)
            packed = outputs[layer.kv if hasattr(layer, "kv") else layer.qkv]
            v = packed[..., -16:].unflatten(2, (2, 8)).transpose(1, 2)  # v comes last: (B, H, M, d)
            assert weights.shape[1] == 2
            expected = layer.proj((weights @ v).transpose(1, 2).flatten(2))
            assert torch.allclose(outputs[layer], expected, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_sum_to_one_and_the_model_stays_as_it_is(build):
    model = build(self_attn=True) if "cross" in build().__module__ else build()
    imgs, noise = normalised(draw_pixels((32, 32))), draw_noise(model, 2, 0)
    with torch.no_grad():
        before = model(imgs, noise=noise)
        attention = read_attention(model, imgs, noise, 0.75, 0.75)
        after = model(imgs, noise=noise)
    assert torch.equal(before, after)
    assert attention.weights.shape == (2, 2, 12, 17)  # J, B, P, 1 + L
    assert torch.allclose(attention.weights.sum(-1), torch.ones(2, 2, 12), atol=1e-6)
    assert torch.allclose(attention.mass.sum(0), torch.ones(2), atol=1e-6)


def test_weights_stand_at_their_patches(tiny_cross, tiny_mae):
    """One head, one block: end to end from the weights as returned to the module's output."""
    small = dict(decoder_num_heads=1, decoder_depth=1)
    imgs = normalised(draw_pixels((32, 32)))
    for model, mask_ratio in ((tiny_cross(**small), 0.5), (tiny_mae(**small), 0.75)):
        noise = draw_noise(model, 2, 0)
        kept = mask_ratio / 2 if hasattr(model.decoder_blocks[0], "cross_attn") else mask_ratio
        attention = read_attention(model, imgs, noise, mask_ratio, kept)
        block = model.decoder_blocks[0]
        layer = getattr(block, "cross_attn", None) or block.attn
        packed_by = layer.kv if hasattr(layer, "kv") else layer.qkv
        with catch_outputs([layer, packed_by]) as outputs, torch.no_grad():
            model(imgs, mask_ratio, kept, noise=noise)
        for i in range(2):
            num_visible, num_predicted = int(16 * (1 - mask_ratio)), int(16 * kept)
            order = noise[i].argsort().tolist()
            wanted = sorted(order[16 - num_predicted :])
            assert attention.ids_pred[i].tolist() == wanted
            assert attention.visible[i].nonzero().flatten().tolist() == sorted(order[:num_visible])
            is_cross = packed_by is not getattr(layer, "qkv", None)
            tokens = order[:num_visible] if is_cross else list(range(16))
            weights = attention.weights[0, i][:, [0] + [1 + patch for patch in tokens]]
            expected = layer.proj(weights @ outputs[packed_by][i][:, -16:])
            rows = outputs[layer][i] if is_cross else outputs[layer][i][[1 + p for p in wanted]]
            assert torch.allclose(rows, expected, atol=1e-6)
            if is_cross:
                hidden = [1 + patch for patch in order[num_visible:]]
                assert (attention.weights[0, i][:, hidden] == 0).all()


def test_mass_is_the_sum_over_its_patches(tiny_mae):
    model = tiny_mae()
    imgs, noise = normalised(draw_pixels((32, 32))), draw_noise(model, 2, 0)
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


def test_attention_picture(build):
    model = build()
    imgs = normalised(draw_pixels((32, 32)))
    one, three = (
        attention_grid(model, imgs, options_of(), num_patches=number) for number in (1, 3)
    )
    assert one.dtype == torch.uint8 and three.shape[1] > one.shape[1] + 4 * 160
    assert one.shape[2] > 3 * 160  # masked, block 1, block 2


# Heat maps and pages.


def test_heat_map_colors():
    matrix = torch.tensor([[0.5, -1.0], [0.0, 1.0]])
    picture = heat_map(matrix, ["a", "b"], ["1", "2"], signed=True)
    colors = {color for _, color in picture.getcolors(1 << 20)}
    assert {SIGNED[0], SIGNED[2], SIGNED[4]} <= colors  # -1, 0 and 1
    assert picture.getpixel((picture.width - 2, picture.height - 2)) == SIGNED[4]
    colors = {c for _, c in heat_map(matrix.abs(), ["a", "b"], ["1", "2"]).getcolors(1 << 20)}
    assert {HEAT[0], HEAT[2], HEAT[4]} <= colors  # 0, half and 1


def test_feature_map_weights(tiny_cross, tiny_mae):
    model = tiny_cross()
    wide = tiny_cross(depth=14)
    picture = feature_map_weights(model)
    assert picture.dtype == torch.uint8 and len(picture) == 3
    assert feature_map_weights(wide).shape[2] > picture.shape[2]
    assert not torch.equal(feature_map_weights(tiny_cross(seed=1)), picture)
    for other in (tiny_mae(), tiny_cross(weight_fm=False, use_input=False)):
        with pytest.raises(ValueError, match="--weight_fm"):
            feature_map_weights(other)


def test_text_is_wrapped_and_kept():
    text = "one line of text that is far too long for the page " * 3
    lines = wrap(text, 200)
    assert " ".join(lines) == " ".join(text.split())
    assert len(lines) > 3 and all(text_width(line) <= 200 for line in lines)
    page = Page()
    page.add_text("x" * 200)  # a long path stays whole
    assert page.draw().shape[2] > text_width("x" * 200)


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
    command = [sys.executable, "-m", "tools.visualize", "--checkpoint", checkpoint, "--out", out]
    command += ["--images", image_folder / "val", image_folder / "train/a/0.jpg", "--device", "cpu"]
    done = subprocess.run([*command, "--num_images", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(out) in done.stdout
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width == 4 * 160 + 3 * 8 + 2 * 8
        assert picture.height > 3 * 80


@pytest.mark.parametrize("flags", [["--weights"], ["--attention", "--num_patches", 2]])
def test_other_modes(tmp_path, image_folder, flags):
    checkpoint = write_checkpoint(tmp_path / "c.pth")
    out = tmp_path / "picture.png"
    images = [] if "--weights" in flags else ["--images", image_folder / "val/a/0.jpg"]
    draw("--checkpoint", checkpoint, "--out", out, *images, *flags)
    with Image.open(out) as picture:
        assert picture.width > 400


def test_grey_pictures_are_drawn_grey(tmp_path, image_folder):
    checkpoint = write_checkpoint(tmp_path / "c.pth", "mae", in_chans=1, mean=[0.5], std=[0.5])
    out = tmp_path / "grid.png"
    draw("--checkpoint", checkpoint, "--images", image_folder / "val", "--out", out)
    red, green, blue = np.asarray(Image.open(out)).astype(int).transpose(2, 0, 1)
    assert (red == green).all() and (green == blue).all()


@pytest.mark.parametrize(
    ("kind", "flags", "sentence"),
    [
        ("fine-tuned", [], "fine-tuned classifier, which predicts no pixels"),
        ("encoder", [], "main_pretrain.py"),
        ("mae", ["--kept_mask_ratio", 0.25], "belongs to CrossMAE"),
        ("mae", ["--num_patches", 2], "--num_patches belongs to --attention"),
        ("mae", ["--num_images", 0], "--num_images is 0"),
        ("mae", ["--mask_ratio", 1.5], "mask_ratio is 1.5"),
    ],
)
def test_refusals(tmp_path, image_folder, kind, flags, sentence):
    checkpoint = write_checkpoint(tmp_path / "c.pth", kind)
    out = tmp_path / "grid.png"
    with pytest.raises(ValueError, match=sentence) as caught:
        draw("--checkpoint", checkpoint, "--images", image_folder, "--out", out, *flags)
    assert isinstance(caught.value, CheckpointError) == (kind in ("fine-tuned", "encoder"))
    assert not out.exists()


def test_refusals_before_anything_is_read(tmp_path):
    for flags, sentence in (
        (["--out", "x.jpg"], "must end in .png"),
        (["--out", "x.png", "--weights", "--images", "y"], "leave out --images"),
        (["--out", "x.png", "--weights", "--mask_ratio", 0.5], "leave out --mask_ratio"),
        (["--out", "x.png", "--attention", "--num_patches", 0], "at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            draw("--checkpoint", "none", *flags)


def test_choice_of_images(tmp_path, image_folder):
    everything = visualize.choose_images([str(image_folder)], 99)
    assert len(everything) == 16
    assert visualize.choose_images([str(image_folder)], 4) == everything[::4]
    one = everything[5]
    assert visualize.choose_images([one], 8) == [one]
    with pytest.raises(UserError, match="no file or folder"):
        visualize.choose_images([str(tmp_path / "none")], 8)
    with pytest.raises(UserError, match="no picture"):
        visualize.choose_images([str(tmp_path)], 8)
    with pytest.raises(ValueError, match="--images"):
        visualize.choose_images([], 8)
