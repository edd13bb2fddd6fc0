"""Properties that hold for random flags, damaged checkpoints and damaged tar headers."""

import copy
import functools
import io
import json
import math
import multiprocessing
import tarfile
import traceback
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main_finetune
import main_pretrain
from util.build import build_pretrain_model
from util.checkpoint import load_model, save_model
from util.data.shards import read_shards
from util.io.checkpoint_file import read_checkpoint
from util.io.errors import UserError
from util.layers.attention import AttentionBackend
from util.optim import NativeScalerWithGradNormCount, build_adamw
from util.rng import get_random_state

COMMON = dict(  # the same examples in every run of the suite
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# --- Flags -----------------------------------------------------------------------------------


def optional(flag: str, values) -> st.SearchStrategy:
    """No flags, or the flag with one of the values."""
    return st.one_of(st.just([]), values.map(lambda v: [flag, *map(str, np.atleast_1d(v))]))


def switch(*flags: str) -> st.SearchStrategy:
    return st.lists(st.sampled_from(flags), unique=True)


def ratios(low: float, high: float) -> st.SearchStrategy:
    return st.floats(low, high).map(lambda x: round(x, 3))


SHARED = [
    optional("--batch_size", st.sampled_from([2, 4])),
    optional("--accum_iter", st.integers(1, 2)),
    optional("--weight_decay", ratios(0, 1)),
    optional("--clip_grad", ratios(0.01, 10)),
    optional("--lr", st.sampled_from([0.0, 1e-5, 0.01])),
    optional("--min_lr", st.sampled_from([0.0, 1e-5])),
    optional("--warmup_epochs", st.integers(0, 1)),
    optional("--seed", st.integers(0, 2**62)),
    optional("--input_size", st.sampled_from([32, (32, 16), (16, 48)])),
    optional("--in_chans", st.sampled_from([1, 3, 4])),
    optional("--mean", ratios(0, 1)),
    optional("--std", ratios(0.1, 1)),
    optional("--amp", st.sampled_from(["auto", "off", "bf16"])),
    optional("--keep_every", st.integers(0, 1)),
    optional("--save_every_minutes", st.sampled_from([0.0001, 5])),
    switch("--skip_bad_images", "--grad_checkpointing", "--no_pin_mem"),
]
MASKING = st.one_of(
    st.just([]),
    ratios(0.5, 0.75).map(lambda kept: ["--mask_ratio", "0.75", "--kept_mask_ratio", str(kept)]),
)
CROSS_MAE = st.one_of(
    switch("--self_attn").map(lambda more: ["--cross_mae", *more]),
    st.tuples(
        switch("--self_attn", "--use_input"),
        optional("--use_fm", st.sampled_from([-1, (0, 2), (-2, 1, 5)])),
    ).map(lambda more: ["--cross_mae", "--weight_fm", *sum(more, [])]),
)
PRETRAIN = st.tuples(
    *SHARED,
    MASKING,
    st.one_of(st.just([]), CROSS_MAE),
    optional("--decoder_depth", st.integers(1, 2)),
    optional("--decoder_embed_dim", st.sampled_from([64, 128])),
    optional("--loader", st.sampled_from(["fast", "pillow"])),
    switch("--norm_pix_loss", "--inverse_lr"),
)
FINETUNE = st.tuples(
    *SHARED,
    optional("--drop_path", ratios(0, 0.9)),
    optional("--layer_decay", ratios(0.1, 1)),
    optional("--smoothing", ratios(0, 0.9)),
    optional("--reprob", ratios(0, 1)),
    optional("--remode", st.sampled_from(["const", "rand", "pixel"])),
    st.one_of(
        optional("--class_weights", st.just("balanced")),
        optional("--mixup", ratios(0.1, 2)),
        optional("--cutmix", ratios(0.1, 2)),
    ),
    optional("--best_by", st.sampled_from(["acc1", "mean_class"])),
    switch("--cls_token"),
)


@pytest.mark.parametrize("script, strategy", [(main_pretrain, PRETRAIN), (main_finetune, FINETUNE)])
def test_valid_flags_train(script, strategy, image_folder, tmp_path, capsys):
    """Any combination of valid flags takes its steps, logs finite values and can be resumed."""
    model = "mae_vit_mini_patch4" if script is main_pretrain else "vit_mini_patch4"
    fixed = f"--model {model} --patch_size 8 --input_size 32 --epochs 1 --num_workers 0"
    fixed = [*fixed.split(), "--batch_size", "4", "--device", "cpu", "--data_path"]
    runs = iter(range(10**6))

    @given(strategy)
    @settings(max_examples=8, **COMMON)
    def check(parts):
        out = tmp_path / str(next(runs))
        flags = [*fixed, str(image_folder), "--output_dir", str(out), *sum(parts, [])]
        if script is main_finetune and "--in_chans" not in flags:
            flags += ["--aa", ""]
        parse = getattr(script, "parse_args", script.get_args_parser().parse_args)
        script.main(parse(flags))
        stats = json.loads((out / "log.txt").read_text())
        assert all(map(math.isfinite, stats.values())), stats
        assert read_checkpoint(out / "checkpoint.pth")["epoch"] == 0
        capsys.readouterr()
        script.main(parse([*flags, "--resume", "auto"]))
        assert "Nothing to do" in capsys.readouterr().out

    check()


# --- Damaged checkpoints ---------------------------------------------------------------------

ARGS = Namespace(
    **dict(model="mae_vit_mini_patch4", cross_mae=True, weight_fm=True, use_input=True),
    **dict(use_fm=[-1], self_attn=False, norm_pix_loss=False, input_size=16, patch_size=8),
    **dict(in_chans=1, decoder_depth=1, decoder_embed_dim=32, grad_checkpointing=False),
    recompute="none",
    **dict(mean=[0.5], std=[0.5], mask_ratio=0.75, kept_mask_ratio=0.25, resume=""),
)
JUNK = [None, -7, "x", 0.5, math.nan, 10**30, [], {}, [1, "a"], {"a": {}}, True, b"\0"]
SHAPES = [(), (0,), (1,), (3,), (7, 5), (1, 1, 1, 1)]


@functools.cache
def saved_states() -> tuple[dict, dict]:
    """State of the model and of the optimizer that the good checkpoint holds."""
    model, optimizer, _ = build_run()
    return model.state_dict(), optimizer.state_dict()["state"]


def build_run():
    """A small CrossMAE, its optimizer after a step, and the loss scaler."""
    torch.manual_seed(0)
    model = build_pretrain_model(copy.copy(ARGS), AttentionBackend())
    optimizer = build_adamw(list(model.parameters()), 0.01, (0.9, 0.95))
    scaler = NativeScalerWithGradNormCount(None, "cpu")
    scaler(model(torch.randn(2, 1, 16, 16)), optimizer)
    return model, optimizer, scaler


def try_loading(path: str) -> str:
    """ "loaded" where all that was loaded is what was saved, "refused", or what went wrong."""
    (expected, expected_optimizer), (model, optimizer, scaler) = saved_states(), build_run()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    args = Namespace(**{**vars(ARGS), "resume": path})
    try:
        checkpoint = load_model(args, model, optimizer, scaler)
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"more than one line: {error}"
    except Exception:
        return traceback.format_exc()
    if any(not value.equal(expected[name]) for name, value in model.state_dict().items()):
        return "other weights were loaded"
    if "optimizer" in checkpoint:
        for i, state in optimizer.state_dict()["state"].items():
            if any(not value.equal(expected_optimizer[i][name]) for name, value in state.items()):
                return f"another state of tensor {i} was loaded"
    scaler(model(torch.randn(2, 1, 16, 16)), optimizer)  # would crash on a damaged heap
    return "loaded"


def serve_loading(connection) -> None:
    """Answer paths with what became of loading them, until the other side closes."""
    torch.set_num_threads(1)
    while path := connection.recv():
        connection.send(try_loading(path))


def entries_of(value, path=()) -> list[tuple]:
    """The paths of everything inside nested dicts and lists."""
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            found += entries_of(value[key], (*path, key))
    return found


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, optimizer, scaler = build_run()
    state = dict(world_size=1, batch_size=2, accum_iter=1, seed=0, iteration=0, best=None)
    state |= dict(num_images=8, meters={}, random=[get_random_state(torch.device("cpu"))])
    args = Namespace(**vars(ARGS), output_dir=str(folder))
    save_model(args, 0, model, optimizer, scaler, {"state": state, "class_names": ["a"]})
    return folder / "checkpoint.pth"


@pytest.fixture(scope="module")
def ask():
    """ask(path): what became of loading it, in a child process; fails if that process dies."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    child = context.Process(target=serve_loading, args=(other,), daemon=True)
    child.start()
    other.close()

    def ask(path) -> str:
        connection.send(str(path))
        try:
            return connection.recv()
        except EOFError:
            child.join()
            return f"the process died with exit code {child.exitcode}"

    yield ask
    connection.send("")
    child.join()


def test_damaged_bytes_load_equal_or_are_refused(good_checkpoint, ask, tmp_path):
    data = good_checkpoint.read_bytes()
    assert ask(good_checkpoint) == "loaded"
    spots = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255))

    @given(st.lists(spots, min_size=1, max_size=3), st.one_of(st.none(), st.integers(0, len(data))))
    @settings(max_examples=20, **COMMON)
    def check(changes, length):
        damaged = bytearray(data)
        for position, value in changes:
            damaged[position] = value
        (tmp_path / "c.pth").write_bytes(damaged[:length])
        assert ask(tmp_path / "c.pth") in ("loaded", "refused")

    check()


def test_wrong_entries_load_equal_or_are_refused(good_checkpoint, ask, tmp_path):
    """An entry of another type, a tensor of another shape or dtype, an entry that is missing."""
    content = torch.load(good_checkpoint, weights_only=True)
    paths = entries_of(content)
    assert len(paths) > 300

    @given(st.sampled_from(paths), st.sampled_from(["junk", "shape", "dtype", "drop"]), st.data())
    @settings(max_examples=40, **COMMON)
    def check(path, kind, data):
        changed = copy.deepcopy(content)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if kind == "drop":
            del inner[path[-1]]
        elif kind == "junk" or not isinstance(inner[path[-1]], torch.Tensor):
            inner[path[-1]] = data.draw(st.sampled_from(JUNK))
        elif kind == "shape":
            others = [shape for shape in SHAPES if shape != tuple(inner[path[-1]].shape)]
            inner[path[-1]] = torch.zeros(data.draw(st.sampled_from(others)))
        else:
            dtypes = st.sampled_from([torch.int64, torch.complex64, torch.bool, torch.uint8])
            inner[path[-1]] = inner[path[-1]].to(data.draw(dtypes))
        torch.save(changed, tmp_path / "c.pth")
        assert ask(tmp_path / "c.pth") in ("loaded", "refused"), path

    check()


# --- Damaged tar headers ---------------------------------------------------------------------


def make_shard(tar_format: int) -> bytes:
    """A tar file of three images, the second with a long name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for index, name in enumerate(("a.png", f"{'b' * 120}.png", "c.png")):
            image = io.BytesIO()
            Image.new("L", (4, 4), 50 * index).save(image, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
    return file.getvalue()


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_tar_headers_are_read_or_refused(tar_format, tmp_path):
    """A header field of random bytes, with a right checksum: images in bounds, or one line."""
    data = make_shard(tar_format)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    fields = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
    numbers = st.sampled_from([b"99999999999", b"-1", b"x", b"\x80" + b"\xff" * 11, b"\0" * 12])
    values = st.one_of(numbers, st.binary(min_size=1, max_size=12))
    path = tmp_path / "s.tar"

    @given(st.sampled_from(headers), st.sampled_from(fields), values)
    @settings(max_examples=150, **COMMON)
    def check(header, field, value):
        damaged = bytearray(data)
        start, length = header + field[0], field[1]
        damaged[start : start + length] = value[:length].ljust(length, b"\0")
        block = damaged[header : header + 512]
        checksum = sum(block) - sum(block[148:156]) + 8 * 32
        damaged[header + 148 : header + 156] = b"%06o\0 " % checksum
        path.write_bytes(damaged)
        try:
            samples = read_shards(str(path))
        except UserError as error:
            assert "\n" not in str(error)
            return
        for member, _ in samples:
            with member.open() as file:
                assert len(file.read()) <= len(data)

    check()
