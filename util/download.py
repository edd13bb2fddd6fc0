"""Files from the network: https and hf:// addresses, kept in torch's cache folder."""

import logging
from pathlib import Path
from urllib.parse import urlparse

import torch

logger = logging.getLogger(__name__)


def fetch(source: str, sha256: str | None = None) -> str:
    """Path of a local copy; a plain path comes back as it is.

    Args:
        sha256: what the file's hash must be, or None.

    Raises:
        ValueError: the address is neither https nor hf, or the file could not be had.
    """
    if "://" not in source:
        return source
    if source.startswith("hf://"):
        return fetch_from_hub(source)
    if not source.startswith("https://"):
        raise ValueError(
            f"{source}: only https:// and hf:// addresses are read; download it yourself."
        )
    name = Path(urlparse(source).path).name
    cached = Path(torch.hub.get_dir(), "checkpoints", name)
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        logger.info("Downloading %s to %s", source, cached)
        try:
            torch.hub.download_url_to_file(source, str(cached), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"Could not download {source} ({error}); check address and network."
            ) from error
    return str(cached)


def fetch_from_hub(source: str) -> str:
    """hf://owner/repository/path/in/it, through huggingface_hub and its cache (HF_HUB_OFFLINE
    counts).
    """
    from huggingface_hub import hf_hub_download

    owner, repository, *path = source.removeprefix("hf://").split("/")
    if not path:
        raise ValueError(f"{source} names no file; write hf://owner/repository/path.")
    try:
        return hf_hub_download(f"{owner}/{repository}", "/".join(path))
    except Exception as error:  # the hub's errors have no common ancestor
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Could not get {source} ({reason}); check name and network.") from error
