"""Images and tar files that mislead: refused in one line, or read right."""

import io
import os
import shutil
import subprocess
import tarfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.image_io import open_image, read_image
from util.data.shard_names import list_shards
from util.data.shards import index_shard, read_shards
from util.data.sources import list_images
from util.datasets import build_pretrain_dataset
from util.io.errors import BadImage, UserError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("read", [open_image, read_image])
def test_other_formats_are_not_decoded(read, tmp_path, monkeypatch):
    """An EPS file named .png would start Ghostscript."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    for name, content in (("3.png", EPS), ("4.jpg", EPS)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match="none of JPEG, PNG, PPM, BMP, TIFF, WEBP"):
            read(tmp_path / name)
    assert not started


@pytest.mark.parametrize("read", [open_image, read_image])
def test_a_fifo_does_not_hang(read, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImage, match="not a regular file"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("read", [open_image, read_image])
@pytest.mark.parametrize("name", ["thin.png", "thin.jpg"])
def test_a_line_of_pixels_is_refused(read, name, tmp_path):
    """122 bytes; resizing its short side to 256 would take gigabytes."""
    Image.new("RGB", (1, 20000)).save(tmp_path / name)
    with pytest.raises(BadImage, match="1 x 20000 pixels"):
        read(tmp_path / name)
    Image.new("RGB", (2, 2000)).save(tmp_path / name)
    read(tmp_path / name)


def test_both_loaders_agree_on_transparency(tmp_path):
    """Pillow weighs the colors of RGBA by alpha when it resizes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 40, 4), dtype=np.uint8)
    pixels[:20, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = dict(data_path=str(tmp_path), input_size=16, in_chans=4, seed=0)
    options |= dict(mean=[0.5] * 4, std=[0.5] * 4)
    fast, pillow = (
        build_pretrain_dataset(Namespace(loader=loader, **options))[0, 0][0]
        for loader in ("fast", "pillow")
    )
    torch.testing.assert_close(fast, pillow, rtol=0, atol=0)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


def test_hard_links_are_followed(tmp_path):
    """tar stores the second name of a file as a link to the first."""
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(png(index))
        os.link(tmp_path / f"{index}.png", tmp_path / f"{index}-again.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    subprocess.run(["tar", "-cf", "s.tar", *names], cwd=tmp_path, check=True)
    samples = read_shards(str(tmp_path / "s.tar"))
    found = {str(m).split(":")[-1]: open_image(m, 1).getpixel((0, 0)) for m, _ in samples}
    assert found == {name: int(name[0]) for name in names}


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_refused(form, tmp_path):
    """Their bytes are not contiguous: read as they lie, the pixels are silently wrong."""
    array = np.zeros((64, 64, 13), np.float32)
    array[-1] = 1
    np.save(tmp_path / "full.npy", array)
    sparse = ["cp", "--sparse=always", "full.npy", "a.npy"]
    subprocess.run(sparse, cwd=tmp_path, check=True)
    pack = ["tar", "-S", f"--format={form}", "-cf", "s.tar", "a.npy"]
    subprocess.run(pack, cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "s.tar") as tar:
        if not tar.next().issparse():
            pytest.skip("the file system stores no holes")
    with pytest.raises(UserError, match="a.npy is sparse"):
        read_shards(str(tmp_path / "s.tar"))


def header(**fields) -> bytes:
    """A tar file of one image whose header holds these PAX records."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {name.replace("__", "."): value for name, value in fields.items()}
        info.size = len(png(1))
        tar.addfile(info, io.BytesIO(png(1)))
    return file.getvalue()


HEADERS = {
    "size of 23 digits": dict(size="9" * 23),
    "size that is no number": dict(size="many"),
    "negative size": dict(size="-5"),
    "ten terabytes": dict(size=str(10**13)),
    "sparse map": dict(GNU__sparse__map="a,b", GNU__sparse__size="10"),
    "sparse version 1": dict(GNU__sparse__major="1", GNU__sparse__minor="0"),
    "sparse version 0": dict(GNU__sparse__size="x"),
}


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_end_in_one_line(name, is_last, tmp_path):
    """Alone, and behind a sound image: tarfile takes some of them as the end of the file."""
    (tmp_path / "s.tar").write_bytes(header()[:1024] * is_last + header(**HEADERS[name]))
    with pytest.raises(UserError, match="Cannot read the shard .*s.tar") as caught:
        read_shards(str(tmp_path / "s.tar"))
    assert len(str(caught.value).splitlines()) == 1


def test_flipped_header_bytes(tmp_path):
    """Any byte of a header: an index of images that can be read, or a refusal."""
    good = header()
    for position in range(0, 512, 3):
        data = bytearray(good)
        data[position] ^= 0x41
        (tmp_path / "s.tar").write_bytes(data)
        try:
            samples = read_shards(str(tmp_path / "s.tar"))
        except UserError:
            continue
        for member, _ in samples:
            assert open_image(member, 1).getpixel((0, 0)) == 1


def test_hidden_places_count_neither_in_folders_nor_in_tars(tmp_path):
    for place in ("a", ".ipynb_checkpoints"):
        (tmp_path / "data" / place).mkdir(parents=True)
        (tmp_path / "data" / place / "0.png").write_bytes(png(0))
    subprocess.run(["tar", "-cf", "s.tar", "data"], cwd=tmp_path, check=True)
    subprocess.run(["tar", "-cf", "t.tar", "./data"], cwd=tmp_path, check=True)
    assert len(list_images(tmp_path / "data").samples) == 1
    for name in ("s.tar", "t.tar"):
        assert len(index_shard(tmp_path / name).images) == 1


def test_hidden_tar_files_and_folders_are_no_shards(tmp_path):
    (tmp_path / "old.tar").mkdir()
    (tmp_path / ".cache.tar").touch()
    (tmp_path / "a.png").write_bytes(png(0))
    assert list_shards(tmp_path) == []
    assert len(list_images(tmp_path).samples) == 1
    shutil.rmtree(tmp_path / "old.tar")
