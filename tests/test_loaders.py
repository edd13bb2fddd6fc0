"""The order of images, replaced images, errors of workers, and slow data loading."""

import logging
import multiprocessing
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import run_python
from torch.utils.data import Dataset

import util.data.loaders
from engine_pretrain import train_one_epoch
from util.data.loaders import (
    EvalBatchSampler,
    TrainBatchSampler,
    build_eval_loader,
    build_loader,
    build_train_loader,
)
from util.datasets import MAX_ATTEMPTS, build_dataset, build_pretrain_dataset
from util.io.errors import BadImage
from util.optim import NativeScalerWithGradNormCount
from util.run.signals import kill_workers

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def settings(folder, **changes) -> Namespace:
    images = dict(input_size=32, in_chans=3, mean=MEAN, std=STD, loader="fast", seed=0)
    loading = dict(batch_size=4, num_workers=0, prefetch=2, pin_mem=False, accum_iter=1)
    augment = dict(color_jitter=None, aa="", reprob=0.0, remode="pixel", recount=1)
    more = dict(device=torch.device("cpu"), data_path=str(folder), skip_bad_images=False)
    return Namespace(**(images | loading | augment | more | changes))


@pytest.fixture(autouse=True)
def end_workers():
    """As at the end of a run: an iterator that an error left behind would wait 10 s for them."""
    yield
    handler = signal.getsignal(signal.SIGCHLD)
    kill_workers()
    for worker in multiprocessing.active_children():
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


@pytest.fixture
def image_dir(tmp_path):
    """A flat folder of 24 images, 00.png ... 23.png, image i of the gray level 10 i."""
    for index in range(24):
        Image.new("RGB", (40, 40), (10 * index,) * 3).save(tmp_path / f"{index:02d}.png")
    return tmp_path


def indices_in(batches) -> list[int]:
    """Image indices, from the gray levels of normalized batches."""
    imgs = torch.cat([imgs for imgs, _ in batches])
    return ((imgs[:, 0, 0, 0] * STD[0] + MEAN[0]) * 25.5).round().int().tolist()


def truncate(folder, *indices: int) -> list[str]:
    """Cut these images off in the middle; their paths."""
    paths = [folder / f"{index:02d}.png" for index in indices]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    return [str(path) for path in paths]


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 4), (3, 5)])
def test_ranks_get_disjoint_shards_of_an_epoch(world_size, batch_size, monkeypatch):
    """Equally many full batches, no image twice, another order and remainder in every epoch."""
    monkeypatch.setattr(util.data.loaders, "get_world_size", lambda: world_size)
    epochs = []
    for epoch in (0, 1, 0):
        drawn = []
        for rank in range(world_size):
            monkeypatch.setattr(util.data.loaders, "get_rank", lambda rank=rank: rank)
            batches = TrainBatchSampler(47, batch_size, seed=3)
            batches.set_epoch(epoch)
            assert len(list(batches)) == len(batches) == 47 // world_size // batch_size
            assert all(len(batch) == batch_size for batch in batches)
            drawn += [key for batch in batches for key in batch]
        assert len(set(drawn)) == len(drawn) and {e for e, _ in drawn} == {epoch}
        epochs.append([index for _, index in drawn])
    assert epochs[0] == epochs[2] != epochs[1] and set(epochs[0]) != set(epochs[1])


def test_seed_and_epoch_are_mixed():
    """Orders of eight seeds and epochs all differ, also where seed + epoch is equal."""

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = TrainBatchSampler(47, 4, seed)
        batches.set_epoch(epoch)
        return tuple(index for batch in batches for _, index in batch)

    assert len({order(seed, epoch) for seed in range(8) for epoch in range(8)}) == 64


def test_an_epoch_resumes_in_the_middle():
    batches = TrainBatchSampler(47, 4, seed=3)
    batches.set_epoch(2)
    whole = list(batches)
    batches.set_epoch(2, first_batch=7)
    assert list(batches) == whole[7:] and len(batches) == len(whole) == 11


def test_evaluation_takes_every_image_once():
    parts = [EvalBatchSampler(23, 4, part, 3) for part in range(3)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts] == [2, 2, 2]
    assert sorted(n for part in parts for batch in part for _, n in batch) == list(range(23))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_once_per_epoch(image_dir, num_workers):
    """Every image once per epoch; batches leave the workers as uint8; workers are persistent."""
    args = settings(image_dir, num_workers=num_workers)
    loader = build_train_loader(build_pretrain_dataset(args), args)
    assert next(iter(loader.loader))[0].dtype == torch.uint8
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert all(imgs.dtype == torch.float32 for imgs, _ in batches)
        orders.append(indices_in(batches))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24)) and orders[0] != orders[1]
    assert loader.loader.persistent_workers is (num_workers > 0)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_bad_image_stops_training(image_dir, kind):
    """With its path; tests/test_own_data.py has the real script with DataLoader workers."""
    (path,) = truncate(image_dir, 13)
    args = settings(image_dir)
    if kind == "pretrain":
        dataset = build_pretrain_dataset(args)
    else:
        args.data_path = as_classes(image_dir)
        dataset, path = build_dataset(True, args), "train/cat/13.png"
    with pytest.raises(BadImage, match=f"Cannot read the image .*{path} "):
        list(build_train_loader(dataset, args))


def as_classes(folder) -> str:
    """The same images as DATA/train/cat and DATA/val/cat."""
    root = folder / ".classes"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        (root / split / "cat").symlink_to(folder)
    return str(root)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_and_counted(image_dir, num_workers, caplog):
    """By the next good one, the same every time, and with a warning in every epoch."""
    paths = truncate(image_dir, 5, 6, 23)
    args = settings(image_dir, num_workers=num_workers, skip_bad_images=True)
    loader = build_train_loader(build_pretrain_dataset(args), args)
    expected = sorted([*range(24), 7, 7, 0])
    for bad in (5, 6, 23):
        expected.remove(bad)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        caplog.clear()
        batches = list(loader)
        assert sorted(indices_in(batches)) == expected and len(batches[0]) == 2
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"Epoch: [{epoch}] replaced 3 unreadable images by others" in record.getMessage()
        assert all(path in record.getMessage() for path in paths)
    again = build_train_loader(build_pretrain_dataset(args), args)
    again.set_epoch(1)
    assert all(a.equal(b) for (a, _), (b, _) in zip(batches, again, strict=True))


def test_good_images_are_not_reported(image_dir, caplog):
    caplog.set_level(logging.WARNING)  # these images have few gray levels, which is noted
    args = settings(image_dir, skip_bad_images=True)
    plain = settings(image_dir)
    loaders = [build_train_loader(build_pretrain_dataset(a), a) for a in (args, plain)]
    assert all(a.equal(b) for (a, _), (b, _) in zip(*loaders, strict=True))
    assert not caplog.records


def test_long_lists_are_shortened(image_dir, caplog):
    caplog.set_level(logging.WARNING)  # these images have few gray levels, which is noted
    truncate(image_dir, *range(0, 24, 3))
    args = settings(image_dir, skip_bad_images=True)
    list(build_train_loader(build_pretrain_dataset(args), args))
    message = caplog.messages[0]
    assert "replaced 8 unreadable" in message and message.endswith(" and 3 more")
    assert message.count(".png") == 5


def test_too_many_bad_images_stop_training_all_the_same(image_dir):
    paths = truncate(image_dir, *range(3, 3 + MAX_ATTEMPTS))
    args = settings(image_dir, skip_bad_images=True)
    with pytest.raises(BadImage, match=f"{MAX_ATTEMPTS} images in a row.*{paths[-1]}"):
        list(build_train_loader(build_pretrain_dataset(args), args))


def test_fine_tuning_replaces_in_training_and_never_in_evaluation(image_dir, caplog):
    truncate(image_dir, 5)
    args = settings(image_dir, skip_bad_images=True)
    args.data_path = as_classes(image_dir)
    batches = list(build_train_loader(build_dataset(True, args), args))
    assert len(batches) == 6 and "replaced 1 unreadable images" in caplog.text
    with pytest.raises(BadImage, match="val/cat/05.png"):
        list(build_eval_loader(build_dataset(False, args), args, split=False))


def test_fewer_images_than_a_batch(image_dir):
    args = settings(image_dir, batch_size=32)
    with pytest.raises(ValueError, match="24 training images give 0 batches .*--batch_size 32"):
        build_train_loader(build_pretrain_dataset(args), args)
    args = settings(image_dir, accum_iter=7)
    with pytest.raises(ValueError, match="fewer than --accum_iter 7"):
        build_train_loader(build_pretrain_dataset(args), args)


class Slow(Dataset):
    """Every image takes so many seconds of the clock `now`."""

    def __init__(self, now: list[float], seconds: float):
        self.now, self.seconds = now, seconds

    def __getitem__(self, key):
        self.now[0] += self.seconds
        return torch.zeros(3, 32, 32), 0


@pytest.mark.parametrize("seconds, percent, waits", [(0.012, 32, True), (0.010, 29, False)])
def test_slow_data_loading_is_reported(seconds, percent, waits, tiny_cross, caplog, monkeypatch):
    """Over 30 % of the time spent waiting for 4 images a step, which takes 0.1 s itself: a hint
    with the flag to change.
    """
    caplog.set_level(logging.INFO)
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    args = settings("", lr=0.1, min_lr=0.1, warmup_epochs=0, epochs=1)
    args.mask_ratio, args.kept_mask_ratio = 0.75, 0.5
    model = tiny_cross()
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 0.1))
    loader = build_loader(Slow(now, seconds), TrainBatchSampler(16, 4, 0), args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = NativeScalerWithGradNormCount()
    train_one_epoch(model, loader, optimizer, args.device, 0, scaler, args=args)
    hints = [m for m in caplog.messages if "raise --num_workers (now 0)" in m]
    assert len(hints) == waits
    assert f"waited for data {percent} % of the time" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", ["two\nlines.png", "BadImage: .png", "bell\x07\udcff.png"])
def test_errors_of_workers_arrive_unchanged(name, num_workers, tmp_path):
    """The type and the message as raised, in one line; the worker's traceback is a note."""
    (tmp_path / name).write_bytes(b"")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    args = settings(tmp_path, num_workers=num_workers, batch_size=2)
    with pytest.raises(BadImage) as caught:
        list(build_train_loader(build_pretrain_dataset(args), args))
    shown = name.replace("\n", r"\n").replace("\x07", r"\x07").replace("\udcff", r"\udcff")
    assert str(caught.value).startswith(f"Cannot read the image {tmp_path}/{shown} (empty, or ")
    assert str(caught.value).endswith("(training with --skip_bad_images skips it).")
    assert ("in load\n" in "".join(getattr(caught.value, "__notes__", []))) is (num_workers > 0)


def test_a_script_ends_while_its_workers_wait(tmp_path):
    """Persistent workers ignore SIGTERM, by which Python would end them."""
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    script = "import sys, torch; sys.path[:0] = sys.argv[1:3]; import test_loaders as t\n"
    script += "args = t.settings(sys.argv[3], num_workers=1, batch_size=1)\n"
    script += "loader = t.build_train_loader(t.build_pretrain_dataset(args), args)\n"
    script += "print(len(list(loader)))"
    tests = Path(__file__).parent
    done = run_python("-c", script, tests.parent, tests, tmp_path)
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr


class Broken(Dataset):
    def __getitem__(self, key):
        raise RuntimeError("a bug")


def test_other_errors_keep_the_workers_traceback():
    args = settings("", num_workers=1)
    with pytest.raises(RuntimeError, match="(?s)Caught RuntimeError in DataLoader.*a bug"):
        list(build_loader(Broken(), TrainBatchSampler(8, 4, 0), args))


def test_paths_of_replaced_images_are_shown_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.WARNING)  # these images have few gray levels, which is noted
    (tmp_path / "two\nlines.png").write_bytes(b"")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    args = settings(tmp_path, skip_bad_images=True, batch_size=2)
    list(build_train_loader(build_pretrain_dataset(args), args))
    assert caplog.messages[0].endswith(rf"by others: {tmp_path}/two\nlines.png")
