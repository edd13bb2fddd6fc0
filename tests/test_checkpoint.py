"""Checkpoint files: malicious, damaged, of the wrong type, in all formats, and downloaded."""

import argparse
import http.server
import io
import json
import logging
import os
import pathlib
import pickle
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import urllib.request
import zipfile
from functools import partial

import pytest
import torch
from processes import ROOT

from util.checkpoint import init_from, load_encoder, load_pretrained, load_strict
from util.io import download
from util.io.checkpoint_file import (
    checkpoint_type,
    read_checkpoint,
    strip_prefixes,
    weights_of,
    write_checkpoint,
)
from util.io.errors import CheckpointError, UserError


class Payload:
    """Creates the file `marker` when unpickled without restrictions."""

    def __init__(self, marker, function=os.system):
        self.marker, self.function = marker, function

    def __reduce__(self):
        command = f"touch {self.marker}"
        if self.function is exec:
            command = f"import pathlib; pathlib.Path({str(self.marker)!r}).touch()"
        return self.function, (command,)


class BadNamespace(argparse.Namespace):
    """A subclass, which the allow-list must not accept as argparse.Namespace."""


def opcodes(marker) -> bytes:
    """A hand-written pickle: STACK_GLOBAL of builtins.exec, without a class of this file."""
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()".encode()
    return (
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c"
        + struct.pack("B", len(code))
        + code
        + b"\x85R."
    )


def save(content, path, **options):
    torch.save(content, path, **options)


def legacy_tar(content, path):
    """The format of torch before 0.1.10: a tar of pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def zip_with_extra(content, path, marker):
    """A valid file with added members: a script outside its folder, and TorchScript code."""
    torch.save({"model": {"a": torch.zeros(2)}, "args": content}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escape.py", f"open({str(marker)!r}, 'w')")
        archive.writestr(f"{path.stem}/code/__torch__.py", f"open({str(marker)!r}, 'w')")


def zip_second_pickle(content, path):
    """Two members of one name: checking the first proves nothing about the one that is read."""
    torch.save({"model": {"a": torch.zeros(2)}}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, pickle.dumps(content, 2))


def torchscript(path):
    """A TorchScript model, which torch.load passes to torch.jit.load."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


MALICIOUS = {
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
    "hand-written opcodes": lambda p, m: p.write_bytes(opcodes(m)),
    "zip with added members": lambda p, m: zip_with_extra(argparse.Namespace(x=Payload(m)), p, m),
    "zip, two data.pkl": lambda p, m: zip_second_pickle(Payload(m), p),
    "whole module": lambda p, m: save(torch.nn.Linear(2, 2), p),
    "pathlib in args": lambda p, m: save({"model": {}, "args": {"x": pathlib.PosixPath("a")}}, p),
    "subclass of Namespace": lambda p, m: save({"model": {}, "args": BadNamespace(a=1)}, p),
    "named .safetensors": lambda p, m: save(Payload(m), p.with_suffix(".safetensors")),
    "torchscript": lambda p, m: torchscript(p),
}


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.filterwarnings("ignore")
def test_malicious_file_is_refused(name, tmp_path):
    """No code runs; the error is one line and names the path."""
    path, marker = tmp_path / "bad.pth", tmp_path / "it-ran"
    MALICIOUS[name](path, marker)
    if name.endswith("safetensors"):
        path = path.with_suffix(".safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith((".", ")"))
    assert not marker.exists() and not (tmp_path.parent.parent / "escape.py").exists()


def test_payloads_run_when_unpickled(tmp_path):
    """Without restrictions the payloads run, so the tests above can fail."""
    for function in (os.system, exec):
        marker = tmp_path / function.__name__
        pickle.loads(pickle.dumps(Payload(marker, function)))
        assert marker.exists()
    pickle.loads(opcodes(tmp_path / "third"))
    assert (tmp_path / "third").exists()


def save_valid_file(path):
    torch.manual_seed(0)
    torch.save({"model": {"a": torch.randn(100, 100)}, "epoch": 3}, path)
    return path


def flip_bit(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


DAMAGED = {
    "flipped bit of a tensor": (lambda p: flip_bit(p, p.stat().st_size // 2), "is damaged"),
    "truncated to 0 bytes": (lambda p: p.write_bytes(b""), "(0 bytes) is no"),
    "truncated to 10 bytes": (lambda p: p.write_bytes(p.read_bytes()[:10]), "(10 bytes) is no"),
    "truncated to half": (
        lambda p: p.write_bytes(p.read_bytes()[:20_000]),
        "is not a complete checkpoint",
    ),
    "last bytes missing": (lambda p: p.write_bytes(p.read_bytes()[:-30]), "is not a complete"),
    "web page": (lambda p: p.write_text("<!DOCTYPE html><html>sign in</html>"), "is a web page"),
    "web page, leading blanks": (lambda p: p.write_text("\n\n  <html lang='en'>"), "is a web page"),
    "text": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "is no"),
    "image": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + bytes(500)), "is not a checkpoint"),
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
def test_damaged_file_is_refused(name, tmp_path):
    path = save_valid_file(tmp_path / "file.pth")
    damage, expected = DAMAGED[name]
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_or_bit_flipped_file_is_refused(tmp_path):
    """Truncated anywhere: refused. Any bit flipped: refused, or read with unchanged values."""
    valid = save_valid_file(tmp_path / "valid.pth")
    data, expected = valid.read_bytes(), read_checkpoint(valid)["model"]["a"]
    path = tmp_path / "file.pth"
    for size in range(0, len(data), 997):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    refused = 0
    for offset in range(0, len(data), 211):
        path.write_bytes(data)
        flip_bit(path, offset)
        try:
            assert torch.equal(read_checkpoint(path)["model"]["a"], expected), offset
        except CheckpointError:
            refused += 1
    assert refused > 0.9 * len(data) / 211


def test_missing_file_and_folder_are_refused():
    with pytest.raises(CheckpointError, match="There is no checkpoint file nowhere.pth"):
        read_checkpoint("nowhere.pth")
    with pytest.raises(CheckpointError, match=r"\. is a folder; name a checkpoint in it"):
        read_checkpoint(".")


# Checkpoint types


@pytest.fixture
def files(tmp_path, tiny_cross, tiny_mae, tiny_vit):
    """Paths of checkpoints by model."""
    models = {"cross": tiny_cross(), "mae": tiny_mae(), "vit": tiny_vit(), "vit3": tiny_vit(1)}
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path / f"{name}.pth"
        torch.save({"model": model.state_dict(), "epoch": 1}, paths[name])
    return paths


def test_checkpoint_type(files):
    types = {
        name: checkpoint_type(weights_of(read_checkpoint(path))) for name, path in files.items()
    }
    assert types["cross"] == types["mae"] == "pre-training"
    assert types["vit"] == "fine-tuned"


WRONG_TYPES = {  # model, checkpoint file, regex of the error message
    "fine-tuned expected": (
        "vit",
        "cross",
        "is a pre-training checkpoint, a fine-tuned one is needed.*--finet",
    ),
    "pre-training expected": (
        "cross",
        "vit",
        "is a fine-tuned checkpoint, a pre-training one is.*--init_from",
    ),
    "other decoder": ("cross", "mae", "fits another model"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_type_is_refused(name, files, tiny_cross, tiny_vit):
    model_name, file, message = WRONG_TYPES[name]
    model = {"cross": tiny_cross, "vit": tiny_vit}[model_name](seed=9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_strict(model, weights_of(read_checkpoint(files[file])), str(files[file]))
    assert str(files[file]) in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "change", [dict(embed_dim=64), dict(depth=3), dict(patch_size=4), dict(in_chans=1)]
)
def test_wrong_size_loads_nothing(change, files, tiny_vit, tiny_cross):
    """The encoder loads completely or not at all with --finetune, --init_from and --resume."""
    weights = weights_of(read_checkpoint(files["cross"]))
    for build, load in (
        (tiny_vit, lambda model: load_encoder(model, dict(weights))),
        (tiny_cross, lambda model: init_from(model, read_checkpoint(files["cross"]), "it")),
        (tiny_cross, lambda model: load_strict(model, weights, "file")),
    ):
        model = build(seed=9, **change)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="choose the|use the --model"):
            load(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_supported_formats_load(files, tmp_path, tiny_cross):
    """Bare state dict, prefixes of DDP and compile, safetensors, Namespace, legacy format."""
    from safetensors.torch import save_file

    weights = weights_of(read_checkpoint(files["cross"]))
    prefixed = {f"module._orig_mod.{k}": v for k, v in weights.items()}
    formats = {
        "bare": weights,
        "prefixed": {"model": prefixed},
        "namespace": {"model": weights, "args": argparse.Namespace(model="m", lr=0.1, betas=[1])},
    }
    paths = []
    for name, content in formats.items():
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


def test_only_plain_values_of_args_are_kept(tmp_path, caplog):
    path = tmp_path / "file.pth"
    args = argparse.Namespace(lr=0.1, size=(1, 2), nested={"a": 1}, inner=argparse.Namespace(b=1))
    vars(args)[5] = "integer as name"
    torch.save({"model": {}, "args": args}, path)
    assert read_checkpoint(path)["args"] == {"lr": 0.1, "size": (1, 2)}
    assert caplog.text.count("skipped") == 3
    torch.save({"model": {}, "args": [1]}, path)
    assert read_checkpoint(path)["args"] == {}


def test_file_without_weights_is_refused(tmp_path):
    torch.save({"weights": 3, "epoch": 1}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="entries: weights, epoch"):
        weights_of(read_checkpoint(tmp_path / "file.pth"), "file.pth")


# Writing


def test_checkpoint_loads_with_plain_torch(files):
    """Weights are under `model`, as in MAE; everything else is tensors and plain values."""
    checkpoint = torch.load(files["cross"], map_location="cpu", weights_only=True)
    assert checkpoint["model"]["patch_embed.proj.weight"].shape == (32, 3, 8, 8)


def test_write_checkpoint_replaces_files(tmp_path):
    path, best = tmp_path / "checkpoint.pth", tmp_path / "checkpoint-best.pth"
    write_checkpoint({"epoch": 1}, path, [best])
    write_checkpoint({"epoch": 2}, path)
    assert (read_checkpoint(path)["epoch"], read_checkpoint(best)["epoch"]) == (2, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-best.pth", "checkpoint.pth"]


# Network


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; /elsewhere redirects to http, /short drops the connection, /unsized/NAME
    sends a file without its size.
    """

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
        elif self.path.startswith("/unsized"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(pathlib.Path(self.directory, self.path.split("/")[2]).read_bytes())
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(folder, URL) of a local https server whose certificate is trusted in this test."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command to make a certificate")
    folder, key, cert = tmp_path / "site", tmp_path / "key.pem", tmp_path / "cert.pem"
    folder.mkdir()
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Server, directory=str(folder))
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


def cached_files(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.*"))


def test_download_is_cached(site, tmp_path, capfd):
    """Cached under a unique name, read again without network; with a progress bar."""
    folder, url = site
    for sub in ("a", "b"):
        (folder / sub).mkdir()
        torch.save({"model": {}, "class_names": [sub]}, folder / sub / "checkpoint.pth")
    assert read_checkpoint(f"{url}/a/checkpoint.pth?download=true")["class_names"] == ["a"]
    assert read_checkpoint(f"{url}/b/checkpoint.pth")["class_names"] == ["b"]
    assert "100%" in capfd.readouterr().err
    shutil.copy(folder / "a/checkpoint.pth", folder / "c.pth")
    assert read_checkpoint(f"{url}/unsized/c.pth")["class_names"] == ["a"]
    shutil.rmtree(folder)
    assert read_checkpoint(f"{url}/b/checkpoint.pth")["class_names"] == ["b"]
    assert len(cached_files(tmp_path)) == 3


def test_download_hash_is_verified(site, tmp_path):
    """SHA-256 in the URL or in the file name; on a mismatch nothing is kept."""
    folder, url = site
    torch.save({"model": {}}, folder / "x.pth")
    sha = download.file_hash(folder / "x.pth")
    shutil.copy(folder / "x.pth", folder / f"x-{sha[:16]}.pth")
    shutil.copy(folder / "x.pth", folder / "x-0badc0de.pth")
    shutil.copy(folder / "x.pth", folder / "x-448.pth")
    shutil.copy(folder / "x.pth", folder / "x-20240131.pth")
    wrong = "ab" * 32
    for good in (f"x-{sha[:16]}.pth", f"x.pth#sha256={sha}", "x-448.pth", "x-20240131.pth"):
        read_checkpoint(f"{url}/{good}")
    expected = cached_files(tmp_path)
    for bad in ("x-0badc0de.pth", f"x.pth#sha256={wrong}", f"x-448.pth#sha256={wrong}"):
        with pytest.raises(ValueError, match="has the SHA-256"):
            read_checkpoint(f"{url}/{bad}")
    with pytest.raises(UserError, match="no hash after #sha256="):
        read_checkpoint(f"{url}/x.pth#sha256=")
    assert cached_files(tmp_path) == expected


REFUSED_URLS = {
    "http": ("http://127.0.0.1:9/file.pth", "only https"),
    "file": ("file:///etc/passwd", "only https"),
    "ftp": ("ftp://host/file.pth", "only https"),
    "redirect to http": ("{site}/elsewhere/file.pth", "which is not https"),
    "missing": ("{site}/missing.pth", "404"),
    "dropped connection": ("{site}/short/file.pth", "9 of 1,000 bytes"),
    "no server": ("https://127.0.0.1:9/file.pth", "Connection refused"),
    "hf without file": ("hf://owner/repository", "names no file"),
}


@pytest.mark.parametrize("name", REFUSED_URLS)
def test_invalid_url_is_refused(name, site, tmp_path):
    url, message = REFUSED_URLS[name]
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(url.format(site=site[1]))
    assert "\n" not in str(caught.value)
    assert not cached_files(tmp_path)


def test_untrusted_certificate_is_refused(site, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ValueError, match="certificate verify failed"):
        read_checkpoint(f"{site[1]}/file.pth")


def test_malicious_download_is_refused(site, tmp_path):
    folder, url = site
    torch.save(Payload(tmp_path / "it-ran"), folder / "evil.pth")
    with pytest.raises(CheckpointError, match="would run code"):
        read_checkpoint(f"{url}/evil.pth")
    assert not (tmp_path / "it-ran").exists()


class Hub(Server):
    """The part of the Hugging Face Hub API that a download needs."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        folder, _, name = self.path.split("?")[0].rpartition("/")
        path = pathlib.Path(self.directory, name)
        if not (folder.startswith("/own/repo/resolve/") and path.is_file()):
            body = json.dumps({"error": "Entry not found"}).encode()
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_hub_without_a_network(monkeypatch, caplog):
    """One line at once, where the Hub's own client retries for half a minute and logs each time."""
    monkeypatch.setattr(urllib.request, "getproxies", dict)

    def fail(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match="Could not download hf://own/nothing/x.pth"):
        download.fetch("hf://own/nothing/x.pth")
    assert caplog.messages == ["Looking for hf://own/nothing/x.pth"]


def test_hub_download(tmp_path):
    """hf:// with a local server: a malicious file runs no code; errors are one line."""
    torch.save(Payload(tmp_path / "it-ran"), tmp_path / "evil.pth")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Hub, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
from util.io.checkpoint_file import read_checkpoint
for url in ("hf://own/repo/evil.pth", "hf://own/repo/none.pth"):
    try:
        read_checkpoint(url)
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
    malicious, missing = [line for line in result.stdout.splitlines() if line.startswith("refused")]
    assert "would run code" in malicious, result.stderr
    assert "Could not download hf://own/repo/none.pth (" in missing
    assert not (tmp_path / "it-ran").exists()


def test_weights_of_no_known_model_are_not_sent_to_another_flag(tiny_vit):
    with pytest.raises(CheckpointError, match="is a unknown checkpoint.*check the file .*foo"):
        load_strict(tiny_vit(), {"foo": torch.zeros(1)}, "x.pth")


@pytest.mark.parametrize("shape", [(4,), (1, 4, 4, 8), ()])
def test_a_position_embedding_of_other_dimensions_is_refused(shape, tiny_vit, tiny_cross):
    weights = tiny_cross().state_dict() | {"pos_embed": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match="pos_embed is .* in the checkpoint"):
        load_pretrained(tiny_vit(), {"model": weights}, "c.pth")


def test_a_name_that_is_too_long_is_one_line():
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        read_checkpoint("a" * 300)
