"""util/data/sources.py: images of folders, files, lists and shards, with their class indices.

tests/test_own_data.py trains on these layouts, tests/test_shards.py on shards.
"""

import os
import re
import tarfile
import tempfile
from pathlib import Path

import pytest

from util.data.sources import (
    evenly_spaced,
    find_classes,
    find_images,
    list_classes,
    list_images,
    list_pretrain_images,
)
from util.io.errors import UserError


def make_files(root: Path, names: str) -> None:
    """Empty files: nothing is opened here."""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def relative(images, root: Path) -> list[tuple[str, int]]:
    return [(os.path.relpath(path, root), label) for path, label in images.samples]


def test_one_folder_has_its_subfolders_as_classes(tmp_path):
    """In any depth; empty ones do not count. A slash at the end changes nothing."""
    make_files(tmp_path, "b/1.png b/deep/2.png a/3.png c/notes.txt")
    expected = [("a/3.png", 0), ("b/1.png", 1), ("b/deep/2.png", 1)]
    for folder in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        images = list_images(folder)
        assert images.classes == ["a", "b"] and relative(images, tmp_path) == expected
        assert images.description == f"in 2 class folders of {folder}"


@pytest.mark.parametrize("names", ["1.png 2.png", "1.png b/2.png"])
def test_a_folder_with_images_of_its_own_has_no_classes(names, tmp_path):
    make_files(tmp_path, names)
    images = list_images(tmp_path)
    assert images.classes == [] and [label for _, label in images.samples] == [0, 0]
    assert images.description.endswith(f"{tmp_path} (without classes)")


def test_several_sources_have_no_classes(tmp_path):
    """In the order of the sources: folder, file, list, shard."""
    make_files(tmp_path, "x/a/1.png x/b/2.png 3.JPG")
    (tmp_path / "list.txt").write_text("x/b/2.png\n3.JPG\n")
    with tarfile.open(tmp_path / "4.tar", "w") as tar:
        tar.add(tmp_path / "3.JPG", "inside.jpg")
    images = list_images(*(tmp_path / name for name in ("x", "3.JPG", "list.txt", "4.tar")))
    names = ["x/a/1.png", "x/b/2.png", "3.JPG", "x/b/2.png", "3.JPG", "4.tar:inside.jpg"]
    assert images.classes == [] and {label for _, label in images.samples} == {0}
    assert [str(path) for path, _ in images.samples] == [str(tmp_path / name) for name in names]


def test_any_single_file_is_an_image_but_for_pretraining_a_list(tmp_path):
    """Pillow reads more formats than the folders are searched for."""
    make_files(tmp_path, "1.gif 2.png")
    assert list_images(tmp_path / "1.gif").samples == [(str(tmp_path / "1.gif"), 0)]
    (tmp_path / "list.lst").write_text("2.png")
    for name in ("list.lst", "2.png"):
        images = list_pretrain_images(str(tmp_path / name))
        assert images.samples == [(str(tmp_path / "2.png"), 0)]


def test_class_folders_of_fine_tuning(tmp_path):
    make_files(tmp_path, "b/1.png b/deep/2.png a/3.png .c/4.png")
    assert relative(list_classes(tmp_path), tmp_path) == [
        ("a/3.png", 0),
        ("b/1.png", 1),
        ("b/deep/2.png", 1),
    ]
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="no image in the class folder .*/d; add some or remove"):
        list_classes(tmp_path)


def test_missing_and_empty_sources_are_named(image_folder, tmp_path):
    for sources in ([tmp_path], [image_folder, tmp_path]):
        with pytest.raises(UserError, match=f"no image in {tmp_path}; name a folder of images"):
            list_images(*sources)
    for name in ("nowhere", "nowhere.png"):
        with pytest.raises(UserError, match=f"Cannot read .*/{name} .No such file.*check the path"):
            list_images(tmp_path / name)


def test_lists_are_in_order(image_folder):
    val = image_folder / "val"
    samples = list_images(val, str(val / "b" / "3.png")).samples
    files = [str(p) for p in sorted(val.glob("*/*"))] + [str(val / "b" / "3.png")]
    assert [path for path, _ in samples] == files


def test_a_byte_order_mark_is_no_part_of_a_path(image_folder, tmp_path):
    """Windows editors put one in front of the first line."""
    path = image_folder / "val/a/0.jpg"
    (tmp_path / "list.txt").write_text(f"{path}\n", encoding="utf-8-sig")
    assert list_images(tmp_path / "list.txt").samples == [(str(path), 0)]


def test_evenly_spaced():
    assert evenly_spaced(range(16), 4) == [0, 4, 8, 12]
    assert evenly_spaced("abcde", 3) == ["a", "b", "d"]
    assert evenly_spaced([1, 2], 9) == [1, 2] and evenly_spaced([], 3) == []


def test_find_images_skips_everything_else(tmp_path):
    """Hidden entries, other files, symlink cycles; a dangling symlink counts as a bad image."""
    for name in ("b/2.JPG", "b/1.png", "a.tiff", ".hidden.png", ".git/x.png", "b/._1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "z.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = [os.path.relpath(path, tmp_path) for path in find_images(tmp_path)]
    assert found == ["a.tiff", "z.jpg", "b/1.png", "b/2.JPG"]
    assert find_classes(tmp_path) == ["b", "folder.png"]


@pytest.fixture
def locked_folder():
    """A folder without read permission."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        (folder / "cat").mkdir(parents=True)
        for path in (Path(name), folder):
            path.chmod(0o755)
        (folder / "cat").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)  # root can read everything
        yield folder / "cat"
        if is_root:
            os.seteuid(0)
        (folder / "cat").chmod(0o755)


def test_an_unreadable_folder_is_named(locked_folder):
    message = f"Cannot read the folder {re.escape(str(locked_folder))} .Permission denied"
    with pytest.raises(UserError, match=message):
        list(find_images(locked_folder.parent))
    with pytest.raises(UserError, match=message):
        find_classes(locked_folder)
    with pytest.raises(UserError, match=message):
        list_images(locked_folder)
    with pytest.raises(UserError, match=message):
        list_pretrain_images(str(locked_folder))
