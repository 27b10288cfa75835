"""The published weights: names, where they are, their checksums and licences.

The data is birder's model registry (Apache-2.0), as of version 0.8.4, and timm's (Apache-2.0), as
of version 1.0.31.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from ..errors import InputError, did_you_mean
from ..utils.arguments import to_pair

# Where birder keeps the files that no hub has (`birder.conf.settings.REGISTRY_BASE_URL`).
BIRDER_BASE_URL = "https://f000.backblazeb2.com/file/birder/models"


@dataclass(frozen=True)
class PublishedWeights:
    """One entry of the catalogue.

    Attributes:
        name: of the weights; birder's file is called so, with `.pt` behind it.
        network: a key of :data:`rope_vit_det.models.VARIANTS`.
        tag: what tells these weights from others of the network.
        image_size: (H, W) in pixels of the training.
        hub_url: folder of the file on a Hugging Face hub; None: it is at `BIRDER_BASE_URL`.
        hub_id: repository of timm's file on the hub; None: the weights are birder's.
        sha256: of the file; None: the one that the hub states for it.
        megabytes: size of the file, in MiB; None: not known.
        description: one sentence of birder's.
        rgb_mean, rgb_std, num_classes: of timm's, whose files do not say it.
        license: of timm's, by the hub's name.
    """

    name: str
    network: str
    tag: str
    image_size: tuple[int, int]
    hub_url: str | None = None
    hub_id: str | None = None
    sha256: str | None = None
    megabytes: float | None = None
    description: str = ""
    rgb_mean: tuple[float, ...] = ()
    rgb_std: tuple[float, ...] = ()
    num_classes: int = 0
    license: str | None = None

    @property
    def file_name(self) -> str:
        """What a file that was got by other means is to be called."""
        return f"{self.name}.{'safetensors' if self.hub_id else 'pt'}"

    @property
    def url(self) -> str:
        """The full address of the file."""
        return f"{self.hub_url or BIRDER_BASE_URL}/{self.file_name}"


@cache
def published_weights() -> Mapping[str, PublishedWeights]:
    """All entries, by name."""
    found = {}
    for file in ("published_weights.json", "timm_weights.json"):
        text = resources.files(__package__).joinpath(file).read_text("utf-8")
        for name, entry in json.loads(text)["weights"].items():
            network, _, tag = name.partition(".")  # timm's way
            values: dict[str, Any] = {"network": network, "tag": tag} | entry
            values["image_size"] = to_pair(entry["image_size"])
            for key in ("rgb_mean", "rgb_std"):
                values[key] = tuple(entry.get(key, ()))
            found[name] = PublishedWeights(name, **values)
    return MappingProxyType(found)


def resolve(name: str) -> PublishedWeights:
    """The entry of a name.

    Raises:
        InputError: there is none; says which name is close, or all of them.
    """
    known = published_weights()
    if name not in known:
        of_network = [each for each in known if known[each].network == name]
        hint = did_you_mean(name, of_network or known) or f"; published are {', '.join(known)}"
        raise InputError(f"no weights are published as {name!r}{hint}")
    return known[name]
