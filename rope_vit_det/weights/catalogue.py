"""The published weights: names, where they are, and their checksums.

The data is birder's model registry (Apache-2.0), as of version 0.8.4.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from ..errors import InputError

# Where birder keeps the files that no hub has (`birder.conf.settings.REGISTRY_BASE_URL`).
BIRDER_BASE_URL = "https://f000.backblazeb2.com/file/birder/models"


@dataclass(frozen=True)
class PublishedWeights:
    """One entry of the catalogue.

    Attributes:
        name: of the weights; the file is called so, with `.pt` behind it.
        network: a key of :data:`rope_vit_det.models.VARIANTS`.
        tag: what tells these weights from others of the network.
        image_size: (H, W) in pixels of the training.
        megabytes: size of the file, in MiB.
        sha256: of the file.
        hub_url: folder of the file on a Hugging Face hub; None: it is at `BIRDER_BASE_URL`.
        description: one sentence of birder's.
    """

    name: str
    network: str
    tag: str
    image_size: tuple[int, int]
    megabytes: float
    sha256: str
    hub_url: str | None
    description: str

    @property
    def file_name(self) -> str:
        return f"{self.name}.pt"

    @property
    def url(self) -> str:
        """The full address of the file."""
        return f"{self.hub_url or BIRDER_BASE_URL}/{self.file_name}"


@cache
def published_weights() -> Mapping[str, PublishedWeights]:
    """All entries, by name."""
    text = resources.files(__package__).joinpath("published_weights.json").read_text("utf-8")
    return MappingProxyType(
        {
            name: PublishedWeights(name, **entry | {"image_size": tuple(entry["image_size"])})
            for name, entry in json.loads(text)["weights"].items()
        }
    )


def resolve(name: str) -> PublishedWeights:
    """The entry of a name.

    Raises:
        InputError: there is none; says which name is close, or all of them.
    """
    known = published_weights()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]!r}?" if close else f"published are {', '.join(known)}"
        raise InputError(f"no weights are published as {name!r}; {hint}")
    return known[name]
