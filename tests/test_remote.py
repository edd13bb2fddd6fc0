"""Shards at a URL: copied once per machine, complete or not at all, and read as local ones."""

import contextlib
import http.server
import importlib.util
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.callbacks import TqdmCallback
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from processes import FINETUNE, PRETRAIN, SAVE_EVERY_STEP, fork_server, read_log
from test_labels import pack

import main_pretrain
from tools import knn
from util.data import remote, shard_copy
from util.data.remote import localize, run_together
from util.data.shards import read_shards
from util.data.sources import list_pretrain_images
from util.eval.knn import OnlineKnn
from util.io.errors import UserError

PATTERN = "memory://bucket/set-{0000..0002}.tar"
FORK = multiprocessing.get_context("fork")  # inherits the file system in memory

needs_aiohttp = pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp"), reason="fsspec needs aiohttp for http URLs"
)


def png(seed: int) -> bytes:
    import io

    file = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """set-{0000..0002}.tar with 10 images each, and {train,val}/ of two classes."""
    root = tmp_path_factory.mktemp("served")
    for part in range(3):
        pack(
            root / f"set-{part:04d}.tar", {f"{part}{i}.png": png(10 * part + i) for i in range(10)}
        )
    for seed, split in enumerate(("train", "val")):
        members = {f"{'ab'[i % 2]}/{i}.png": png(100 * seed + i) for i in range(24)}
        pack(root / split / "part-0000.tar", members)
    return root


@pytest.fixture
def bucket(shards, monkeypatch):
    """memory://bucket with the shards; yields the paths that were copied from it."""
    MemoryFileSystem.store.clear()
    file_system = fsspec.filesystem("memory")
    for path in shards.rglob("*.tar"):
        file_system.pipe(f"/bucket/{path.relative_to(shards)}", path.read_bytes())
    copied, get_file = [], MemoryFileSystem.get_file

    def recorded(self, rpath, *args, **options):
        copied.append(Path(rpath).name)
        assert isinstance(options["callback"], TqdmCallback)  # the Hub's fast path needs it
        return get_file(self, rpath, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", recorded)
    yield copied
    MemoryFileSystem.store.clear()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {".lock"}


def test_a_copy_is_equal_and_made_once(bucket, shards, tmp_path):
    """Every byte, whatever the pattern; a second start copies nothing and needs no server."""
    local = localize(PATTERN, tmp_path, "train", "", any_part=True)
    assert local == str(tmp_path / "memory/bucket/set-{0000..0002}.tar")
    assert bucket == [f"set-000{i}.tar" for i in range(3)]
    for part in range(3):
        name = f"set-{part:04d}.tar"
        assert (tmp_path / "memory/bucket" / name).read_bytes() == (shards / name).read_bytes()
    found = list_pretrain_images(local)
    assert np.array_equal(
        found.samples.index, read_shards(f"{shards}/set-{{0000..0002}}.tar").index
    )
    MemoryFileSystem.store.clear()
    assert localize(PATTERN, tmp_path, "") == local and len(bucket) == 3
    assert names(tmp_path) == {f"set-000{i}.tar" for i in range(3)}


def test_folders(bucket, shards, tmp_path):
    """Pre-training takes train/ where it exists; with labels train/ and val/; else the folder."""
    url = "memory://bucket/"
    assert list_pretrain_images(localize(url, tmp_path, "train", "", any_part=True)).samples.paths
    assert bucket == ["part-0000.tar"]
    local = localize(url, tmp_path, "train", "val")
    assert bucket == ["part-0000.tar"] * 2
    classes, train, val = knn.list_splits(local)
    assert classes == ["a", "b"] and len(train) == len(val) == 24
    assert len(read_shards(localize(url, tmp_path, ""))) == 30


def test_a_local_source_is_unchanged(tmp_path):
    for source in (str(tmp_path), "a-{0..3}.tar", "pipe:cat a.tar"):
        assert localize(source, None, "") == source


@pytest.mark.parametrize(
    "url, parts, message",
    [
        ("memory://bucket/set-0009.tar", [""], "Cannot read .*set-0009.tar .*check the URL"),
        ("memory://nothing", [""], "no .tar file in memory://nothing"),
        ("memory://bucket/train", ["train", "val"], "no .tar file in .*; labels are needed"),
        (PATTERN, ["train", "val"], "labels are needed here: name the folder that holds"),
        ("memory://bucket/x.tar.gz", [""], "is compressed.*unpack it"),
        ("memory://bucket/../x.tar", [""], r"holds '\.\.'"),
        ("nosuch://bucket/x.tar", [""], "Cannot read nosuch://bucket/x.tar .*nosuch"),
    ],
)
def test_mistakes_end_in_one_line(url, parts, message, bucket, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        localize(url, tmp_path, *parts)
    assert "\n" not in str(error.value) and not bucket
    with pytest.raises(UserError, match="is not on this machine; add --shard_cache DIR"):
        localize(url, None, *parts)


def test_several_kinds_are_refused_before_they_are_copied(bucket, tmp_path):
    fsspec.filesystem("memory").pipe("/bucket/validation-0.tar", b"")
    with pytest.raises(UserError, match="several kinds .set, validation.; name those to use"):
        localize("memory://bucket", tmp_path, "")
    assert not bucket


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(UserError, match="needs a package: pip install s3fs$"):
        localize("s3://bucket/a.tar", tmp_path, "")


def test_too_little_space_is_said_first(bucket, shards, monkeypatch, tmp_path):
    """With both sizes, before anything is copied; what is there already does not count."""
    usage = namedtuple("usage", "total used free")
    size = sum((shards / f"set-{part:04d}.tar").stat().st_size for part in range(3))
    monkeypatch.setattr(shard_copy.shutil, "disk_usage", lambda _: usage(0, 0, size - 1))
    monkeypatch.setattr(shard_copy, "in_gib", lambda size: f"{size} bytes")
    text = rf"3 shards to copy take {size} bytes, --shard_cache .* has {size - 1} bytes free"
    with pytest.raises(UserError, match=text):
        localize(PATTERN, tmp_path, "")
    assert not bucket and not names(tmp_path)
    localize("memory://bucket/set-0000.tar", tmp_path, "")
    localize(PATTERN, tmp_path, "")
    assert len(bucket) == 3


def test_a_short_copy_is_refused(bucket, monkeypatch, tmp_path):
    """The size differs from what the server said."""
    get_file = MemoryFileSystem.get_file

    def cut(self, rpath, lpath, **options):
        get_file(self, rpath, lpath, **options)
        os.truncate(lpath, 5000)

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    with pytest.raises(UserError, match=r"set-0000.tar ended after 5,000 of [\d,]+ bytes"):
        localize(PATTERN, tmp_path, "")
    assert not names(tmp_path)


def test_a_full_disk_is_not_the_servers_fault(bucket, monkeypatch, tmp_path):
    def full(self, rpath, lpath, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    with pytest.raises(UserError, match="Cannot write .*set-0000.tar .No space left"):
        localize(PATTERN, tmp_path, "")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write to --shard_cache .*choose another"):
        localize(PATTERN, tmp_path / "file", "")


def slow_copy(cache: Path, log: Path, is_endless: bool) -> None:
    """Copy in a child process; `log` gets a line when a copy has begun."""
    get_file = MemoryFileSystem.get_file

    def slow(self, rpath, lpath, **options):
        get_file(self, rpath, lpath, **options)
        if is_endless and "0001" in rpath:
            os.truncate(lpath, 3000)
        with open(log, "a") as file:
            file.write(f"{Path(rpath).name}\n")
        time.sleep(60 if is_endless and "0001" in rpath else 0.3)

    MemoryFileSystem.get_file = slow
    localize(PATTERN, cache, "")
    os._exit(0)


def wait_for(is_done, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_process_copies_and_the_others_wait(bucket, tmp_path):
    log = tmp_path / "log"
    children = [
        FORK.Process(target=slow_copy, args=(tmp_path / "cache", log, False)) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 3
    assert log.read_text().splitlines() == [f"set-000{i}.tar" for i in range(3)]


def test_a_killed_copy_leaves_nothing_that_looks_complete(bucket, shards, tmp_path):
    """The second shard is half there: not under its name. A process that waits goes on with it,
    and removes the rest of the other's.
    """
    cache, log = tmp_path / "cache", tmp_path / "log"
    first = FORK.Process(target=slow_copy, args=(cache, log, True))
    first.start()
    wait_for(lambda: log.exists() and "0001" in log.read_text())
    second = FORK.Process(target=slow_copy, args=(cache, tmp_path / "log2", False))
    second.start()
    time.sleep(1)
    assert not (tmp_path / "log2").exists()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(60)
    assert second.exitcode == 0
    assert (tmp_path / "log2").read_text().split() == ["set-0001.tar", "set-0002.tar"]
    assert names(cache) == {f"set-000{i}.tar" for i in range(3)}
    for name in names(cache):
        assert (cache / "memory/bucket" / name).read_bytes() == (shards / name).read_bytes()


def test_an_interrupt_ends_a_copy(bucket, monkeypatch, tmp_path):
    """Ctrl-C on the main thread: the thread that copies stops and removes what it has."""
    get_file = MemoryFileSystem.get_file

    def interrupted(self, rpath, lpath, callback, **options):
        get_file(self, rpath, lpath, callback=callback, **options)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            time.sleep(0.01)
            callback.relative_update(0)

    def copy() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            localize(PATTERN, tmp_path, "")
        except KeyboardInterrupt:
            os._exit(0 if not names(tmp_path) else 2)

    monkeypatch.setattr(MemoryFileSystem, "get_file", interrupted)
    process = FORK.Process(target=copy)  # the signal would end a worker of pytest-xdist
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_an_error_of_another_rank_is_raised(monkeypatch):
    """Also while this rank is still busy."""
    monkeypatch.setattr(
        remote, "all_gather_objects", lambda own: [own, (False, ["the other failed"])]
    )
    started = time.monotonic()
    with pytest.raises(UserError, match="the other failed"):
        run_together(lambda stop: stop.wait(30))
    assert time.monotonic() - started < 10


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and lists it; counts requests; slowly where told."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        super().do_GET()

    def copyfile(self, source, target) -> None:
        while chunk := source.read(4096):
            target.write(chunk)
            time.sleep(self.server.delay)


@contextlib.contextmanager
def serve(folder: Path):
    """(URL, server) of a local http server."""
    handler = partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests, server.delay, server.daemon_threads = [], 0, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", server
        server.shutdown()


def tar_requests(server) -> list[str]:
    return sorted(path for path in server.requests if path.endswith(".tar"))


@needs_aiohttp
def test_two_ranks_train_as_on_local_shards(shards, tmp_path):
    """From a http server: each shard is requested once, and never again; the logs are equal. Killed
    in the middle of a copy, and then in the middle of the second epoch.
    """
    cache = tmp_path / "cache"
    with serve(shards) as (url, server):
        pattern = f"{url}/set-{{0000..0002}}.tar"
        flags = [*PRETRAIN, "--batch_size", "4", "--log_dir", "", "--epochs", "2"]
        out = tmp_path / "killed"
        out.mkdir()
        server.delay = 0.05
        command = [*flags, "--shard_cache", cache, "--data_path", pattern, "--output_dir", out]
        runs = fork_server.start_group(2, command, out)
        wait_for(lambda: len(tar_requests(server)) == 2, 60)
        for run in runs:
            run.kill()
        for run in runs:
            run.wait()
        finished = {path.name for path in cache.rglob("set-*.tar")}
        assert finished == {"set-0000.tar"}
        server.delay = 0
        server.requests.clear()
        shutil.rmtree(out)
        out.mkdir()
        runs = fork_server.start_group(2, command, out)
        assert [run.wait(120) for run in runs] == [0, 0], runs[0].text()
        assert f"30 images in 3 shards of {cache}/http/127.0.0.1" in runs[0].text()
        assert tar_requests(server) == ["/set-0001.tar", "/set-0002.tar"]
        first = read_log(out)
        server.requests.clear()
        out = tmp_path / "resumed"
        out.mkdir()
        command[-1] = out
        slow = dict.fromkeys((0, 1), {"delay": 0.3})
        runs = fork_server.start_group(2, [*command, *SAVE_EVERY_STEP], out, faults=slow)
        steps = out / "steps.0"
        wait_for(lambda: steps.exists() and len(steps.read_text().splitlines()) >= 4, 60)
        for run in runs:
            run.kill()
        for run in runs:
            run.wait()
        assert len(read_log(out)) == 1
        runs = fork_server.start_group(2, command, out)
        assert [run.wait(120) for run in runs] == [0, 0], runs[0].text()
        assert read_log(out) == first and not tar_requests(server)
    out = tmp_path / "local"
    out.mkdir()
    local = ["--data_path", f"{shards}/set-{{0000..0002}}.tar", "--output_dir", out]
    runs = fork_server.start_group(2, [*flags, *local], out)
    assert [run.wait(120) for run in runs] == [0, 0], runs[0].text()
    assert first == read_log(out) and len(first) == 2


@needs_aiohttp
def test_fine_tuning_from_a_listed_folder(shards, tmp_path):
    """http://host/ lists train/ and val/; --eval then needs no new copy."""
    with serve(shards) as (url, server):
        out = tmp_path / "out"
        out.mkdir()
        flags = ["--data_path", url, "--shard_cache", tmp_path / "cache", "--log_dir", ""]
        flags += ["--epochs", "1", "--warmup_epochs", "0", "--output_dir", out]
        (run,) = fork_server.start_group(1, [*FINETUNE, *flags], out)
        assert run.wait(120) == 0, run.text()
        assert tar_requests(server) == ["/train/part-0000.tar", "/val/part-0000.tar"]
        assert "24 training and 24 validation images of 2 classes" in run.text()


def test_data_of_online_knn(bucket, tmp_path):
    """--knn_data at a URL is copied as --data_path is; the flag alone allows --shard_cache."""
    flags = ["--data_path", ".", "--knn_every", "1", "--knn_data", "memory://bucket"]
    flags += ["--shard_cache", str(tmp_path)]
    args = main_pretrain.get_args_parser().parse_args(flags)
    main_pretrain.check_args(args)
    online = OnlineKnn(args)
    assert online.classes == ["a", "b"] and sorted(bucket) == ["part-0000.tar"] * 2
    assert [len(split) for split in online.splits] == [24, 24]
    assert (tmp_path / "memory/bucket/val/part-0000.tar").is_file()


@needs_aiohttp
def test_a_connection_that_is_cut(shards, monkeypatch, tmp_path):
    def cut(self, source, target):
        target.write(source.read(3000))
        self.close_connection = True

    monkeypatch.setattr(Handler, "copyfile", cut)
    with serve(shards) as (url, _), pytest.raises(UserError, match="set-0000.tar"):
        localize(f"{url}/set-0000.tar", tmp_path, "")
    assert not names(tmp_path)


def test_the_flag_acts_or_is_refused(tmp_path, shards):
    (run,) = fork_server.start_group(
        1,
        [*PRETRAIN, "--data_path", shards, "--shard_cache", tmp_path, "--output_dir", ""]
        + ["--resume", ""],
        tmp_path,
    )
    assert run.wait(60) == 1 and "--shard_cache is for tar files at a URL" in run.text()


def test_a_copy_that_left_the_source_is_not_trained_on(bucket, tmp_path):
    url = "memory://bucket/train"
    local = Path(localize(url, tmp_path, ""))
    (local / "part-0009.tar").write_bytes(b"")
    with pytest.raises(UserError, match="part-0009.tar is not at memory://bucket/train any more"):
        localize(url, tmp_path, "")
