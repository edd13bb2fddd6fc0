"""Files that are not what they should be: hostile, damaged, of another kind, from the network."""

import argparse
import http.server
import io
import json
import os
import pathlib
import pickle
import shutil
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial

import pytest
import torch
from processes import ROOT

from util.checkpoint import init_from, load_encoder, load_strict
from util.io import download
from util.io.checkpoint_file import (
    checkpoint_type,
    read_checkpoint,
    strip_prefixes,
    weights_of,
    write_checkpoint,
)
from util.io.errors import CheckpointError

SENTENCE_END = (".", ")")


class Payload:
    """Runs a command where it is unpickled by something that trusts it."""

    def __init__(self, marker, function=os.system):
        self.marker, self.function = marker, function

    def __reduce__(self):
        command = f"touch {self.marker}"
        if self.function is exec:
            command = f"import pathlib; pathlib.Path({str(self.marker)!r}).touch()"
        return self.function, (command,)


class BadNamespace(argparse.Namespace):
    """Pickles as argparse.Namespace does, with a payload as one of its values."""


def opcodes(marker) -> bytes:
    """A pickle written by hand: STACK_GLOBAL of builtins.exec, without a class of ours."""
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()".encode()
    return (
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c"
        + struct.pack("B", len(code))
        + code
        + b"\x85R."
    )


def save(thing, path, **how):
    torch.save(thing, path, **how)


def legacy_tar(thing, path):
    """The form of torch before 0.1.10: a tar with pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(thing)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def zip_with_extra(thing, path, marker):
    """A proper file to which members were added: a script outside, a model's code."""
    torch.save({"model": {"a": torch.zeros(2)}, "args": thing}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escape.py", f"open({str(marker)!r}, 'w')")
        archive.writestr(f"{path.stem}/code/__torch__.py", f"open({str(marker)!r}, 'w')")


def zip_second_pickle(thing, path):
    """Two members of one name: a check of the first says nothing about the one that is read."""
    torch.save({"model": {"a": torch.zeros(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, pickle.dumps(thing, 2))


def torchscript(path):
    """A compiled model, which torch.load would hand on to another reader."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


HOSTILE = {
    "os.system": lambda p, m: save(Payload(m), p),
    "in model": lambda p, m: save({"model": {"a": Payload(m)}}, p),
    "in args": lambda p, m: save({"model": {}, "args": argparse.Namespace(x=Payload(m))}, p),
    "deep in args": lambda p, m: save(
        {"model": {}, "args": argparse.Namespace(a=[{"b": (Payload(m),)}])}, p
    ),
    "as key": lambda p, m: save({"model": {}, "args": {"a": {1: Payload(m, eval)}}}, p),
    "exec": lambda p, m: save({"model": {}, "epoch": Payload(m, exec)}, p),
    "legacy, not zip": lambda p, m: save(
        {"model": Payload(m)}, p, _use_new_zipfile_serialization=False
    ),
    "legacy tar": lambda p, m: legacy_tar(Payload(m), p),
    "bare pickle": lambda p, m: p.write_bytes(pickle.dumps(Payload(m))),
    "bare pickle, protocol 0": lambda p, m: p.write_bytes(pickle.dumps(Payload(m), 0)),
    "opcodes by hand": lambda p, m: p.write_bytes(opcodes(m)),
    "zip with members": lambda p, m: zip_with_extra(argparse.Namespace(x=Payload(m)), p, m),
    "zip, two data.pkl": lambda p, m: zip_second_pickle(Payload(m), p),
    "a whole module": lambda p, m: save(torch.nn.Linear(2, 2), p),
    "pathlib in args": lambda p, m: save({"model": {}, "args": {"x": pathlib.PosixPath("a")}}, p),
    "subclass of Namespace": lambda p, m: save({"model": {}, "args": BadNamespace(a=1)}, p),
    "named .safetensors": lambda p, m: save(Payload(m), p.with_suffix(".safetensors")),
    "torchscript": lambda p, m: torchscript(p),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile(name, tmp_path):
    """Nothing is run; one sentence says so with the path."""
    path, marker = tmp_path / "bad.pth", tmp_path / "it-ran"
    HOSTILE[name](path, marker)
    if name.endswith("safetensors"):
        path = path.with_suffix(".safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence and sentence.endswith(SENTENCE_END)
    assert not marker.exists() and not (tmp_path.parent.parent / "escape.py").exists()


def test_payload_is_live(tmp_path):
    """The payloads of these tests do act where a file is trusted, so the tests can fail."""
    for function in (os.system, exec):
        marker = tmp_path / function.__name__
        pickle.loads(pickle.dumps(Payload(marker, function)))
        assert marker.exists()
    pickle.loads(opcodes(tmp_path / "third"))
    assert (tmp_path / "third").exists()


def good_file(path):
    torch.manual_seed(0)
    torch.save({"model": {"a": torch.randn(100, 100)}, "epoch": 3}, path)
    return path


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


DAMAGED = {
    "flipped byte of a tensor": (lambda p: flip(p, p.stat().st_size // 2), "is damaged"),
    "cut to 0": (lambda p: p.write_bytes(b""), "(0 bytes) is no"),
    "cut to 10 bytes": (lambda p: p.write_bytes(p.read_bytes()[:10]), "(10 bytes) is no"),
    "cut in half": (
        lambda p: p.write_bytes(p.read_bytes()[:20_000]),
        "is not a complete checkpoint",
    ),
    "last bytes missing": (lambda p: p.write_bytes(p.read_bytes()[:-30]), "is not a complete"),
    "web page": (lambda p: p.write_text("<!DOCTYPE html><html>sign in</html>"), "is a web page"),
    "web page, blanks": (lambda p: p.write_text("\n\n  <html lang='en'>"), "is a web page"),
    "text": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "is no"),
    "picture": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + bytes(500)), "is not a checkpoint"),
    "zip of something else": (
        lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "hello"),
        "is not a complete checkpoint",
    ),
    "zip bomb": (
        lambda p: zipfile.ZipFile(p, "w", zipfile.ZIP_DEFLATED).writestr("a", bytes(10**7)),
        "is compressed",
    ),
    "a list": (lambda p: torch.save([1, 2], p), "holds a list"),
    "a tensor": (lambda p: torch.save(torch.zeros(3), p), "holds a Tensor"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(name, tmp_path):
    path = good_file(tmp_path / "file.pth")
    damage, words = DAMAGED[name]
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_cut_and_many_flips(tmp_path):
    """Cut anywhere, it is refused; with any byte flipped, refused or read as it was."""
    good = good_file(tmp_path / "good.pth")
    data, expected = good.read_bytes(), read_checkpoint(good)["model"]["a"]
    path = tmp_path / "file.pth"
    for size in range(0, len(data), 997):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    refused = 0
    for where in range(0, len(data), 211):
        path.write_bytes(data)
        flip(path, where)
        try:
            assert torch.equal(read_checkpoint(path)["model"]["a"], expected), where
        except CheckpointError:
            refused += 1
    assert refused > 0.9 * len(data) / 211


@pytest.mark.parametrize("path", ["nowhere.pth", "."])
def test_no_file(path):
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        read_checkpoint(path)


# Kinds


@pytest.fixture
def files(tmp_path, tiny_cross, tiny_mae, tiny_vit):
    """Checkpoints by kind: (path, model)."""
    models = {"cross": tiny_cross(), "mae": tiny_mae(), "vit": tiny_vit(), "vit3": tiny_vit(1)}
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path / f"{name}.pth"
        torch.save({"model": model.state_dict(), "epoch": 1}, paths[name])
    return paths


def test_kinds(files):
    found = {
        name: checkpoint_type(weights_of(read_checkpoint(path))) for name, path in files.items()
    }
    assert found["cross"] == found["mae"] == "pre-training"
    assert found["vit"] == "fine-tuned"


WRONG = {  # model that is to be filled, file, words of the sentence
    "fine-tuned wanted": (
        "vit",
        "cross",
        "is a pre-training checkpoint, a fine-tuned one is needed.*--finet",
    ),
    "pre-training wanted": (
        "cross",
        "vit",
        "is a fine-tuned checkpoint, a pre-training one is.*--init_from",
    ),
    "other decoder": ("cross", "mae", "fits another model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kind(name, files, tiny_cross, tiny_vit):
    wanted, file, words = WRONG[name]
    model = {"cross": tiny_cross, "vit": tiny_vit}[wanted](seed=9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        load_strict(model, weights_of(read_checkpoint(files[file])), str(files[file]))
    assert str(files[file]) in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "change", [dict(embed_dim=64), dict(depth=3), dict(patch_size=4), dict(in_chans=1)]
)
def test_other_size(change, files, tiny_vit, tiny_cross):
    """All of the encoder or nothing, for --finetune, --init_from and --resume alike."""
    weights = weights_of(read_checkpoint(files["cross"]))
    for build, load in (
        (tiny_vit, lambda model: load_encoder(model, dict(weights))),
        (tiny_cross, lambda model: init_from(model, str(files["cross"]))),
        (tiny_cross, lambda model: load_strict(model, weights, "file")),
    ):
        model = build(seed=9, **change)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="choose the|use the --model"):
            load(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_forms_that_load(files, tmp_path, tiny_cross):
    """Bare state dict, prefixes of DDP and compile, safetensors, Namespace, legacy form."""
    from safetensors.torch import save_file

    weights = weights_of(read_checkpoint(files["cross"]))
    prefixed = {f"module._orig_mod.{k}": v for k, v in weights.items()}
    forms = {
        "bare": weights,
        "prefixed": {"model": prefixed},
        "namespace": {"model": weights, "args": argparse.Namespace(model="m", lr=0.1, betas=[1])},
    }
    paths = []
    for name, content in forms.items():
        for legacy in (False, True):
            paths.append(tmp_path / f"{name}{legacy}.pth")
            torch.save(content, paths[-1], _use_new_zipfile_serialization=not legacy)
    paths.append(tmp_path / "w.safetensors")
    save_file({k: v.contiguous() for k, v in weights.items()}, paths[-1])
    for path in paths:
        model = tiny_cross(seed=9)
        load_strict(model, weights_of(read_checkpoint(path), str(path)), str(path))
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()), path
    assert read_checkpoint(tmp_path / "namespaceTrue.pth")["args"]["lr"] == 0.1
    assert strip_prefixes("module.module.blocks.0") == "blocks.0"


def test_args_keep_plain_values_only(tmp_path, caplog):
    path = tmp_path / "file.pth"
    args = argparse.Namespace(lr=0.1, size=(1, 2), odd={"a": 1}, inner=argparse.Namespace(b=1))
    vars(args)[5] = "number as name"
    torch.save({"model": {}, "args": args}, path)
    assert read_checkpoint(path)["args"] == {"lr": 0.1, "size": (1, 2)}
    assert caplog.text.count("skipped") == 3
    torch.save({"model": {}, "args": [1]}, path)
    assert read_checkpoint(path)["args"] == {}


def test_no_weights(tmp_path):
    torch.save({"weights": 3, "epoch": 1}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="entries: weights, epoch"):
        weights_of(read_checkpoint(tmp_path / "file.pth"), "file.pth")


# Writing


def test_other_tools_can_read(files, tmp_path):
    """`model` is where MAE's own loading code looks, and nothing but tensors and plain values."""
    checkpoint = torch.load(files["cross"], map_location="cpu", weights_only=True)
    assert checkpoint["model"]["patch_embed.proj.weight"].shape == (32, 3, 8, 8)


def test_write_replaces_whole_files(tmp_path):
    path, best = tmp_path / "checkpoint.pth", tmp_path / "checkpoint-best.pth"
    write_checkpoint({"epoch": 1}, path, [best])
    write_checkpoint({"epoch": 2}, path)
    assert (read_checkpoint(path)["epoch"], read_checkpoint(best)["epoch"]) == (2, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-best.pth", "checkpoint.pth"]


# Network


class Answers(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; /elsewhere leads to http, /short breaks off."""

    def do_GET(self):
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/file.pth")
            self.end_headers()
        elif self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(folder, https address) of a server on this machine, whose certificate is trusted here."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command to make a certificate")
    folder, key, cert = tmp_path / "site", tmp_path / "key.pem", tmp_path / "cert.pem"
    folder.mkdir()
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    make += ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run(make, check=True, capture_output=True, timeout=60)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Answers, directory=str(folder))
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    yield folder, f"https://localhost:{server.server_port}"
    server.shutdown()


def cached(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.*"))


def test_download(site, tmp_path, capfd):
    """Kept under a name of its own, read again without the network, with a progress bar."""
    folder, address = site
    for sub in ("a", "b"):
        (folder / sub).mkdir()
        torch.save({"model": {}, "class_names": [sub]}, folder / sub / "checkpoint.pth")
    assert read_checkpoint(f"{address}/a/checkpoint.pth?download=true")["class_names"] == ["a"]
    assert read_checkpoint(f"{address}/b/checkpoint.pth")["class_names"] == ["b"]
    assert "100%" in capfd.readouterr().err
    shutil.rmtree(folder)
    assert read_checkpoint(f"{address}/b/checkpoint.pth")["class_names"] == ["b"]
    assert len(cached(tmp_path)) == 2


def test_hash(site, tmp_path):
    """In the address or in the name; a wrong one leaves nothing behind."""
    folder, address = site
    torch.save({"model": {}}, folder / "x.pth")
    sha = download.file_hash(folder / "x.pth")
    shutil.copy(folder / "x.pth", folder / f"x-{sha[:16]}.pth")
    shutil.copy(folder / "x.pth", folder / "x-0badc0de.pth")
    shutil.copy(folder / "x.pth", folder / "x-448.pth")
    shutil.copy(folder / "x.pth", folder / "x-20240131.pth")
    wrong = "ab" * 32
    for good in (f"x-{sha[:16]}.pth", f"x.pth#sha256={sha}", "x-448.pth", "x-20240131.pth"):
        read_checkpoint(f"{address}/{good}")
    kept = cached(tmp_path)
    for bad in ("x-0badc0de.pth", f"x.pth#sha256={wrong}", f"x-448.pth#sha256={wrong}"):
        with pytest.raises(ValueError, match="has the SHA-256"):
            read_checkpoint(f"{address}/{bad}")
    assert cached(tmp_path) == kept


REFUSED = {
    "http": ("http://127.0.0.1:9/file.pth", "only https"),
    "file": ("file:///etc/passwd", "only https"),
    "ftp": ("ftp://host/file.pth", "only https"),
    "leads to http": ("{site}/elsewhere/file.pth", "which is not https"),
    "missing": ("{site}/missing.pth", "404"),
    "breaks off": ("{site}/short/file.pth", "9 of 1,000 bytes"),
    "nobody there": ("https://127.0.0.1:9/file.pth", "Connection refused"),
    "hf without file": ("hf://owner/repository", "names no file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_addresses(name, site, tmp_path):
    address, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        read_checkpoint(address.format(site=site[1]))
    assert "\n" not in str(caught.value)
    assert not cached(tmp_path)


def test_certificate_is_checked(site, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ValueError, match="certificate verify failed"):
        read_checkpoint(f"{site[1]}/file.pth")


def test_hostile_download(site, tmp_path):
    folder, address = site
    torch.save(Payload(tmp_path / "it-ran"), folder / "evil.pth")
    with pytest.raises(CheckpointError, match="would run code"):
        read_checkpoint(f"{address}/evil.pth")
    assert not (tmp_path / "it-ran").exists()


class Hub(Answers):
    """As much of the hub as a download needs."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = pathlib.Path(self.directory, "evil.pth")
        if not self.path.split("?")[0].endswith("/own/repo/resolve/main/evil.pth"):
            body = json.dumps({"error": "Entry not found"}).encode()
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_hub(tmp_path):
    """hf:// against a server on this machine: a hostile file is not run; errors take one line."""
    torch.save(Payload(tmp_path / "it-ran"), tmp_path / "evil.pth")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Hub, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
from util.io.checkpoint_file import read_checkpoint
for address in ("hf://own/repo/evil.pth", "hf://own/repo/none.pth"):
    try:
        read_checkpoint(address)
    except ValueError as error:
        print("refused:", error)
"""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "h")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    server.shutdown()
    first, second = [line for line in result.stdout.splitlines() if line.startswith("refused")]
    assert "would run code" in first, result.stderr
    assert "Could not download hf://own/repo/none.pth (" in second
    assert not (tmp_path / "it-ran").exists()
