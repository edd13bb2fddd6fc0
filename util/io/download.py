"""Downloads: https:// and hf:// URLs, cached in torch's hub folder."""

import contextlib
import hashlib
import logging
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urldefrag, urlparse

import torch
from tqdm import tqdm

from util.io.errors import UserError, one_line
from util.io.files import atomic_write

logger = logging.getLogger(__name__)

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # torch's custom: name-0a1b2c3d.pth
CHUNK = 1 << 20  # bytes


class NotInRepository(UserError):
    """A repository of the Hub, or its cache when offline, does not have the file."""


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https URLs only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith("https://"):
            raise URLError(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(source: str) -> str:
    """Local path of a source; a plain path is returned unchanged.

    A SHA-256 hash, or its beginning, may follow the URL (https://host/file.pth#sha256=...,
    hf://owner/repository/file.pth#sha256=...) or stand in the file name as in torch's own files; it
    is verified then.

    Raises:
        UserError: the URL is neither https:// nor hf://, the download failed, or the hash differs.
    """
    if "://" not in source:
        return source
    url, fragment = urldefrag(source)
    name = Path(urlparse(url).path).name or "file"
    if fragment == "sha256=":
        raise UserError(f"{source} names no hash after #sha256=; add it or leave #sha256= out.")
    wanted = fragment.removeprefix("sha256=") or hash_in(name)
    if source.startswith("hf://"):
        path = fetch_from_hub(url)
        if wanted:
            check_hash(url, file_hash(Path(path)), wanted)
        return path
    if not source.startswith("https://"):
        raise UserError(
            f"{source}: only https:// and hf:// URLs are supported; download it yourself."
        )
    key = hashlib.sha256(url.encode()).hexdigest()[:12]  # file names repeat, URLs do not
    cached = Path(torch.hub.get_dir(), "checkpoints", f"{key}-{name}")
    if not cached.exists():
        download(url, cached, wanted)
    elif wanted:
        check_hash(url, file_hash(cached), wanted)
    return str(cached)


def hash_in(name: str) -> str:
    """Beginning of the hash in a file's name, or ''; digits alone are a date or a size."""
    found = HASH_IN_NAME.search(name)
    return found[1] if found and not found[1].isdecimal() else ""


def download(url: str, target: Path, wanted: str) -> None:
    """Download with a progress bar; the file appears at `target` complete or not at all."""
    logger.info("Downloading %s to %s", url, target)
    opener = urllib.request.build_opener(HttpsOnly)
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    digest = hashlib.sha256()
    with atomic_write(target) as tmp_path, open(tmp_path, "wb") as file:
        for chunk in receive(opener, request, url):
            file.write(chunk)
            digest.update(chunk)
        check_hash(url, digest.hexdigest(), wanted)


def receive(opener, request, url: str) -> Iterator[bytes]:
    """The answer's bytes, chunk by chunk.

    Raises:
        UserError: the connection failed or ended early.
    """
    try:
        with opener.open(request, timeout=60) as answer:
            size, got = int(answer.headers.get("Content-Length", 0)), 0
            with tqdm(total=size or None, unit="B", unit_scale=True, unit_divisor=1024) as bar:
                while chunk := answer.read(CHUNK):
                    yield chunk
                    bar.update(len(chunk))
                    got += len(chunk)
        if size and got != size:
            raise OSError(f"got {got:,} of {size:,} bytes")
    except (OSError, HTTPException) as error:  # urllib's errors are OSErrors
        raise UserError(
            f"Could not download {url} ({error}); check the URL and the network."
        ) from error


def check_hash(url: str, found: str, wanted: str) -> None:
    """Raises UserError unless the hash begins with what is wanted."""
    if not found.startswith(wanted.lower()):
        raise UserError(
            f"{url} has the SHA-256 {found}, not {wanted}; it is not the expected file."
        )


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet_hub():
    """The Hub's client without its log of retries; where there is no network, its cache alone."""
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or is_offline(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_offline(endpoint: str) -> bool:
    """Whether the Hub cannot be reached at all; its own client retries for half a minute."""
    if urllib.request.getproxies():  # which may know names that this machine does not
        return False
    try:
        socket.getaddrinfo(urlparse(endpoint).hostname, None)
    except OSError:
        return True
    return False


def fetch_repository(source: str, names: Sequence[str]) -> Path:
    """Folder with config.json of hf://owner/repository and those of `names` that it has.

    Of several weight files only the first is fetched.
    """
    folder = Path(fetch_from_hub(f"{source}/config.json")).parent
    for name in names:
        with contextlib.suppress(NotInRepository):
            fetch_from_hub(f"{source}/{name}")
            if Path(name).suffix in (".safetensors", ".bin"):
                break
    return folder


def fetch_from_hub(source: str) -> str:
    """hf://owner/repository/path, through huggingface_hub and its cache (or HF_HUB_OFFLINE)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    logger.info("Looking for %s", source)
    owner, repository, *path = [*source.removeprefix("hf://").split("/"), "", ""]
    if not any(path):
        raise UserError(f"{source} names no file; use hf://owner/repository/path.")
    try:
        with quiet_hub():
            return hf_hub_download(f"{owner}/{repository}", "/".join(path).rstrip("/"))
    except Exception as error:  # the hub's errors have no common base class
        is_missing = isinstance(error, EntryNotFoundError)
        raise (NotInRepository if is_missing else UserError)(
            f"Could not download {source} ({one_line(error)}); check the name and the network."
        ) from error
