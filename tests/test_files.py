"""Atomic writes and hard links with their fallback."""

import os

import pytest

from util.io.errors import UserError
from util.io.files import atomic_write, link_or_copy


def test_atomic_write_completes_or_keeps_the_old_file(tmp_path):
    path = tmp_path / "new" / "out.csv"
    with atomic_write(path) as tmp_file:
        tmp_file.write_text("first")
        tmp_file.chmod(0o600)
        assert not path.exists()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(RuntimeError, match="failed midway"), atomic_write(path) as tmp_file:
        tmp_file.write_text("second, ha")
        raise RuntimeError("failed midway")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    for bad in (path.parent, path / "below a file"):
        with pytest.raises(UserError, match="Cannot write"), atomic_write(bad):
            pytest.fail("the block must not run")


def test_link_or_copy_copies_without_hard_links(tmp_path, monkeypatch):
    """Some network and FAT file systems lack hard links; simulated with a mock."""

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("text")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"
