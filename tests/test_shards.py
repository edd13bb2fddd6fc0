"""Images in tar files: the same training as from a folder of the same images."""

import io
import logging
import shutil
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import PRETRAIN, fork_server, read_log

from util.data.image_io import open_image
from util.data.loaders import build_train_loader
from util.data.shard_names import expand
from util.data.shards import read_shards
from util.data.sources import list_pretrain_images
from util.datasets import build_pretrain_dataset
from util.io.errors import BadImage, UserError

COUNT = 22  # images


def add(tar: tarfile.TarFile, name: str, data: bytes, kind=tarfile.REGTYPE) -> None:
    """A member as webdataset's writer makes it: a time with fractions needs a header of its own."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.type = len(data), 1700000000.25, kind
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of images, folder of three shards that hold the same, in the same order)."""
    root = tmp_path_factory.mktemp("shards")
    plain, shards = root / "plain", root / "shards"
    plain.mkdir()
    shards.mkdir()
    random = np.random.RandomState(0)
    files = []
    for index in range(COUNT):
        pixels = random.randint(0, 256, (32, 40, 3), dtype=np.uint8)
        path = plain / f"{index:06d}.{'jpg' if index % 2 else 'png'}"
        Image.fromarray(pixels).save(path)
        files.append(path)
    for shard, part in enumerate((files[:3], files[3:15], files[15:])):
        with tarfile.open(shards / f"set-{shard:04d}.tar", "w") as tar:
            add(tar, "deep", b"", tarfile.DIRTYPE)
            for path in part:
                long_name = f"deep/{'x' * 120}/" if path.stem == "000004" else ""
                add(tar, f"{long_name}{path.name}", path.read_bytes())
                add(tar, f"{path.stem}.cls", b"7")
                add(tar, f"._{path.name}", b"hidden, of another system")
    (shards / "README.txt").write_text("no shard")
    return plain, shards


def settings(path, **changes) -> Namespace:
    images = dict(input_size=32, in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, loader="fast", seed=0)
    loading = dict(batch_size=4, num_workers=0, prefetch=2, pin_mem=False, accum_iter=1)
    more = dict(device=torch.device("cpu"), data_path=str(path), skip_bad_images=False)
    return Namespace(**(images | loading | more | changes))


def test_every_image_is_found(folders):
    """The bytes of each member are those of its file; hidden and other members do not count."""
    plain, shards = folders
    samples, classes, description = list_pretrain_images(str(shards))
    assert classes == [] and description == f"in 3 shards of {shards}"
    files = sorted(plain.iterdir())
    assert len(samples) == COUNT
    for file, (member, label) in zip(files, samples, strict=True):
        assert member.open().read() == file.read_bytes() and label == 0
        assert str(member).endswith(file.name) and ".tar:" in str(member)


def test_patterns_and_folders_mean_the_same(folders, tmp_path):
    _, shards = folders
    whole = read_shards(str(shards))
    (tmp_path / "train").symlink_to(shards)
    below_train = list_pretrain_images(str(tmp_path)).samples
    for other in (read_shards(f"{shards}/set-{{0000..0002}}.tar"), below_train):
        assert np.array_equal(other.index, whole.index)
    assert len(read_shards(f"{shards}/set-0001.tar")) == 12
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_equal_those_of_a_folder(folders, num_workers):
    """In every epoch, and with more DataLoader workers than the images' shards would feed."""
    loaders = []
    for path, workers in zip(folders, (0, num_workers), strict=True):
        args = settings(path, num_workers=workers)
        loaders.append(build_train_loader(build_pretrain_dataset(args), args))
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        batches = list(zip(*loaders, strict=True))
        assert len(batches) == COUNT // 4
        assert all(a.equal(b) for (a, _), (b, _) in batches)


@pytest.mark.parametrize("size", [1, 2])
def test_runs_equal_those_on_a_folder(folders, size, tmp_path):
    """Real runs of 1 and 2 ranks: the losses are bitwise equal."""
    logs = []
    for path in folders:
        out = tmp_path / path.name
        out.mkdir()
        flags = ["--data_path", path, "--batch_size", "4", "--output_dir", out]
        flags += ["--epochs", "1", "--warmup_epochs", "0", "--log_dir", ""]
        runs = fork_server.start_group(size, [*PRETRAIN, *flags], out)
        assert [run.wait(120) for run in runs] == [0] * size, runs[0].text()
        logs.append(read_log(out))
        where = f"in 3 shards of {path}" if path.name == "shards" else f"flat folder {path}"
        batches = f"{COUNT // size // 4} batches per epoch"
        assert f"{COUNT} images" in runs[0].text() and where in runs[0].text()
        assert batches in runs[0].text()
    assert logs[0] == logs[1] and len(logs[0]) == 1


def test_arrays_in_shards(tmp_path):
    """.npy members, as 13 channels."""
    values = np.random.RandomState(0).rand(9, 11, 13).astype(np.float32)
    file = io.BytesIO()
    np.save(file, values)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "scene.npy", file.getvalue())
    args = settings(tmp_path / "a.tar", in_chans=13, mean=[0.0] * 13, std=[1.0] * 13)
    dataset = build_pretrain_dataset(args)
    assert dataset[0, 0][0].shape == (13, 32, 32)
    assert open_image(dataset.samples[0][0], 13).equal(torch.from_numpy(values).permute(2, 0, 1))


def test_a_bad_member_is_named(folders, tmp_path, caplog):
    """Shard and name; --skip_bad_images skips it."""
    plain, _ = folders
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(plain.iterdir()):
            data = path.read_bytes()
            add(tar, path.name, data[:200] if path.stem == "000009" else data)
    args = settings(shard)
    with pytest.raises(BadImage, match=f"{shard}:000009.jpg .Truncated"):
        build_pretrain_dataset(args)[0, 9]
    caplog.set_level(logging.WARNING)
    args = settings(shard, skip_bad_images=True, batch_size=COUNT)
    list(build_train_loader(build_pretrain_dataset(args), args))
    assert f"replaced 1 unreadable images by others: {shard}:000009.jpg" in caplog.text


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def spoil_header(path) -> None:
    """A header in the middle, which tarfile takes for the end of the archive."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[4].offset
    data[start : start + 100] = bytes(range(100, 200))
    path.write_bytes(data)


def say_html(path) -> None:
    path.write_bytes(b"<html>" * 500)


@pytest.mark.parametrize("damage", [cut, spoil_header, say_html])
def test_a_damaged_shard_is_named(damage, folders, tmp_path):
    """And never taken for a shorter one."""
    path = tmp_path / "set-0000.tar"
    path.write_bytes((folders[1] / "set-0001.tar").read_bytes())
    damage(path)
    with pytest.raises(ValueError, match=rf"^Cannot read the shard {path} \(.+\); fetch it again"):
        read_shards(str(path))


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("https://host/set-{0000..0003}.tar", "is not on a disk; copy the shards, or mount"),
        ("pipe:cat set-0000.tar", "is not on a disk"),
        ("s3://bucket/set-0000.tar", "is not on a disk"),
        ("{tmp}/set-0000.tar.gz", "is compressed.*unpack it"),
        ("{tmp}/set-{{0000..0002}}.tar", r"no file .*set-0001.tar \(2 of 3 shards are missing\)"),
        ("{tmp}", "several kinds .set, validation.; name those to use"),
        ("{tmp}/validation-0.tar", "no image in the 1 shards"),
    ],
)
def test_mistakes_end_in_one_line(pattern, message, tmp_path):
    for name in ("set-0000.tar", "validation-0.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            add(tar, "notes.txt", b"no image")
    path = pattern if "://" in pattern or "pipe" in pattern else pattern.format(tmp=tmp_path)
    with pytest.raises(UserError, match=message):
        list_pretrain_images(path)


def test_tar_files_beside_images_are_refused(image_folder, tmp_path):
    """Which of the two is meant? An archive left beside its class folders is not the data."""
    shutil.copytree(image_folder, tmp_path / "data")
    place = next((tmp_path / "data").glob("train"), tmp_path / "data")
    with tarfile.open(place / "backup.tar", "w") as tar:
        add(tar, "a.png", b"")
    with pytest.raises(ValueError, match="holds tar files and images"):
        list_pretrain_images(str(tmp_path / "data"))


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_a_header_that_claims_terabytes_is_one_line(kind, tmp_path):
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 2**46
    (tmp_path / "s.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(UserError, match="Cannot read the shard"):
        read_shards(str(tmp_path / "s.tar"))


def test_a_shard_that_disappears_is_a_bad_image(folders, tmp_path):
    shard = tmp_path / "s.tar"
    add_one(shard)
    ((member, _),) = read_shards(str(shard))
    for damage in (lambda: shard.write_bytes(b""), shard.unlink):
        damage()
        with pytest.raises(BadImage, match=r"s\.tar at byte 0"):
            open_image(member)


def test_an_empty_folder_named_as_a_shard(tmp_path):
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match="There is no image in the 0 shards"):
        read_shards(str(tmp_path / "x.tar"))


def test_names_with_their_count_are_one_kind(tmp_path):
    for i in range(2):
        add_one(tmp_path / f"train-{i:05d}-of-00002.tar")
    assert len(read_shards(str(tmp_path))) == 2


def test_a_file_with_braces_in_its_name(tmp_path):
    add_one(tmp_path / "a{1}.tar")
    assert len(read_shards(str(tmp_path / "a{1}.tar"))) == 1


def add_one(shard) -> None:
    """A shard with one image."""
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "png")
    with tarfile.open(shard, "w") as tar:
        add(tar, "a.png", data.getvalue())
