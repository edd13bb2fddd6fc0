"""util/io/files.py: files are whole or as before."""

import os

import pytest

from util.io.errors import UserError
from util.io.files import atomic_write, link_or_copy


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "new" / "out.csv"
    with atomic_write(path) as waiting:
        waiting.write_text("first")
        waiting.chmod(0o600)
        assert not path.exists()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with (
        pytest.raises(RuntimeError, match="on the way"),
        atomic_write(path) as waiting,
    ):
        waiting.write_text("second, ha")
        raise RuntimeError("on the way")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    for bad in (path.parent, path / "below a file"):
        with pytest.raises(UserError, match="Cannot write"), atomic_write(bad):
            pytest.fail("the block must not begin")


def test_copy_where_links_are_unknown(tmp_path, monkeypatch):
    """Some network and memory-stick file systems know no second names; a mock stands for one."""

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("text")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"
