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
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get

from ..errors import InputError
from .catalogue import PublishedWeights

_HUB_URL = re.compile(r"https://[^/]+/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)")
_RANGE_NOT_SATISFIABLE = 416


def fetch(weights: PublishedWeights) -> Path:
    """The file of published weights, from the cache or downloaded into it, with the right sha256.

    Raises:
        InputError: it cannot be downloaded (says where to put a file that was got by other means),
            or it is not the file that was published (says which file to remove, and how).
    """
    by_hand = cache_folder("weights") / weights.file_name
    if by_hand.is_file():
        path = by_hand
    elif weights.hub_url is None:
        path = _from_birder(weights, by_hand)
    else:
        path = _from_hub(weights, by_hand)
    found = sha256_of(path)
    if found != weights.sha256:
        remove = shlex.join(["rm", *map(str, _links(path))])
        raise InputError(
            f"{path} is not {weights.name} as published: its sha256 is {found}, expected "
            f"{weights.sha256}; nothing was loaded; remove it ({remove}) and try again"
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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _from_hub(weights: PublishedWeights, by_hand: Path) -> Path:
    place = _HUB_URL.fullmatch(weights.hub_url)
    where = {
        "repo_id": place["repo"],
        "filename": weights.file_name,
        "revision": place["revision"],
    }
    # With a checksum there is no need to ask the hub whether it has a newer file.
    cached = try_to_load_from_cache(**where)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(**where, library_name="rope-vit-det"))
    except Exception as error:  # of the hub's, its HTTP client's, its transfer protocol's, …
        raise _unreachable(weights, hf_hub_url(**where), by_hand, error) from None


def _from_birder(weights: PublishedWeights, path: Path) -> Path:
    partial = path.with_name(path.name + ".incomplete")
    try:
        with FileLock(path.with_name(path.name + ".lock")):
            if path.is_file():  # another process was faster
                return path
            try:
                _download(weights.url, partial)
            except HfHubHTTPError as error:
                if error.response.status_code != _RANGE_NOT_SATISFIABLE:
                    raise
                partial.unlink()  # it is no part of the file
                _download(weights.url, partial)
            os.replace(partial, path)
            return path
    except Exception as error:
        raise _unreachable(weights, weights.url, path, error) from None


def _download(url: str, partial: Path) -> None:
    """Goes on with what an earlier process left."""
    with open(partial, "ab") as file:
        http_get(url, file, resume_size=file.tell())


def _unreachable(
    weights: PublishedWeights, url: str, by_hand: Path, error: Exception
) -> InputError:
    return InputError(
        f"{weights.name} is not in the cache, and {url} cannot be downloaded ({_reason(error)}); "
        f"get the file ({weights.megabytes:.0f} MiB) by other means and put it at {by_hand}"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "offline mode is on: HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        return f"the server answered {error.response.status_code}"
    text = " ".join(str(error).split()) or "no answer"
    return f"{type(error).__name__}: {text}"


def _links(path: Path) -> list[Path]:
    """A cached file and what its symbolic links lead to: the hub would link to it again."""
    links = [path]
    while links[-1].is_symlink():
        links.append(Path(os.path.normpath(links[-1].parent / os.readlink(links[-1]))))
    return links
