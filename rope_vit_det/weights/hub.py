"""Downloads of published weights, each checked against its sha256 before anything reads it.

Files come through `huggingface_hub`, with its cache, retries, progress bar, offline mode
(`HF_HUB_OFFLINE`) and endpoint (`HF_ENDPOINT`); the ones that no hub has come over HTTPS from
birder's own address, with its transfer functions. What is not a hub's goes to the folder that it
gives to other libraries, under `HF_HOME`.
"""

import hashlib
import os
import re
import shlex
from pathlib import Path

from filelock import FileLock
from huggingface_hub import (
    cached_assets_path,
    constants,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import http_get

from ..errors import InputError
from .catalogue import PublishedWeights

_HUB_URL = re.compile(r"https://[^/]+/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
TIMM_FILE = "model.safetensors"


def fetch(weights: PublishedWeights) -> Path:
    """The file of published weights, from the cache or downloaded into it, with the right sha256.

    Raises:
        InputError: it cannot be downloaded (says where to put a file that was got by other means),
            or it is not the file that was published (says which file to remove, and how).
    """
    by_hand = cache_folder("weights") / weights.file_name
    expected = weights.sha256
    if by_hand.is_file():
        path = by_hand
    elif weights.hub_id is None and weights.hub_url is None:
        path = _from_birder(weights, by_hand)
    else:
        path = _from_hub(weights, by_hand)
        # The hub's cache calls a large file by the sha256 that the hub states for it.
        expected = expected or Path(os.path.realpath(path)).name
    if expected is None or not _SHA256.fullmatch(expected):
        return path  # put there by hand, or a cache without symbolic links
    found = sha256_of(path)
    if found != expected:
        # What a link of the hub's leads to goes as well: the hub would link to it again.
        files = [path, path.resolve()] if path.is_symlink() else [path]
        remove = shlex.join(["rm", *map(str, files)])
        raise InputError(
            f"{path} is not {weights.name} as published: its sha256 is {found}, expected "
            f"{expected}; nothing was loaded; remove it ({remove}) and try again"
        )
    return path


def cache_folder(name: str) -> Path:
    """A folder of this project's in the cache of `huggingface_hub` (`HF_HOME`).

    Raises:
        InputError: it cannot be made.
    """
    try:
        return cached_assets_path("rope-vit-det", name, "files")
    except (OSError, ValueError) as error:
        raise InputError(
            f"the cache {constants.HF_ASSETS_CACHE} cannot be written ({error}); set HF_HOME to a "
            "folder that can"
        ) from None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(weights: PublishedWeights, by_hand: Path) -> Path:
    repository, file, revision = weights.hub_id or "", TIMM_FILE, "main"
    if place := _HUB_URL.fullmatch(weights.hub_url or ""):
        repository, file, revision = place["repo"], weights.file_name, place["revision"]
    # With a checksum there is no need to ask the hub whether it has a newer file.
    cached = try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(
            hf_hub_download(repository, file, revision=revision, library_name="rope-vit-det")
        )
    except GatedRepoError:
        raise InputError(
            f"{weights.name} is behind a licence ({weights.license}): accept it at "
            f"{constants.ENDPOINT}/{repository}, then log in: hf auth login"
        ) from None
    except Exception as error:  # of the hub's, its HTTP client's, its transfer protocol's, …
        url = hf_hub_url(repository, file, revision=revision)
        raise _unreachable(weights, url, by_hand, error) from None


def _from_birder(weights: PublishedWeights, path: Path) -> Path:
    partial = path.with_name(path.name + ".incomplete")
    try:
        with FileLock(path.with_name(path.name + ".lock")):
            if not path.is_file():  # another process was faster
                with open(partial, "wb") as file:
                    http_get(weights.url, file)
                os.replace(partial, path)
        return path
    except Exception as error:
        raise _unreachable(weights, weights.url, path, error) from None


def _unreachable(
    weights: PublishedWeights, url: str, by_hand: Path, error: Exception
) -> InputError:
    size = f" ({weights.megabytes:.0f} MiB)" if weights.megabytes else ""
    return InputError(
        f"{weights.name} is not in the cache, and {url} cannot be downloaded ({_reason(error)}); "
        f"get the file{size} by other means and put it at {by_hand}"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "offline mode is on: HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        return f"the server answered {error.response.status_code}"
    text = " ".join(str(error).split()) or "no answer"
    return f"{type(error).__name__}: {text}"
