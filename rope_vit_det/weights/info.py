"""What a weights file says about its network, in birder's terms and in ours."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..models.rope_vit import RoPEViT
from ..models.variants import VARIANTS, create_model, is_birders

TASK = "image_classification"
# What of a network a detector leaves out: final norm, embedding norm, pooling head and classifier.
HEAD_PREFIXES = ("norm.", "embedding_norm.", "attn_pool.", "classifier.")
# The version of birder whose file format is written.
BIRDER_VERSION = "v0.8.4"

_RENAMED = {
    "norm_layer_type": "norm_layer",
    "norm_layer_eps": "norm_eps",
    "mlp_layer_type": "mlp_layer",
    "rope_rot_type": "rope_rotation",
    "rope_grid_indexing": "rope_indexing",
    "rope_grid_offset": "rope_offset",
    "rope_temperature": "rope_temperature",
    "pt_grid_size": "default_pt_grid_size",
}
# In what birder's networks differ, it can say in a config too.
_ARGUMENTS = {key for name, each in VARIANTS.items() if is_birders(name) for key in each}
# ... and what timm's files say.
_ARGUMENTS |= {"norm_pooled", "pooling"}
_OUR_NAME = _RENAMED | {key: key for key in _ARGUMENTS - {*_RENAMED.values()}}
_OUR_VALUE = {
    "mlp_layer_type": {
        "FFN": "FeedForward",
        "SwiGLU_FFN": "SwiGLU",
        "Norm_SwiGLU_FFN": "NormSwiGLU",
    },
    "rope_rot_type": {"standard": "halves", "interleaved": "interleaved"},
}
# What a network has where neither its architecture nor a file says.
DEFAULTS = {name: each.default for name, each in inspect.signature(RoPEViT).parameters.items()}


@dataclass(frozen=True)
class WeightsInfo:
    """A weights file without its tensors.

    Attributes:
        network: a key of :data:`rope_vit_det.models.VARIANTS`. ("" only on the way into
            Detectron2, whose config says it: a file whose name does not.)
        tag: what tells these weights from others of the network, None where the name says nothing.
        num_classes: of the classifier, 0 without one.
        class_to_idx: class names to their logits; may be empty.
        image_size: (H, W) in pixels that the position table belongs to.
        rgb_mean, rgb_std: of the input's channels in the order RGB, for values from 0 to 1.
        config: what the file changes in the architecture, with birder's keys (and "pooling",
            "norm_pooled"); empty: nothing.
        task: birder's name of what the network does.
        birder_version: that wrote the file, None where it does not say.
        license: of published weights, by the hub's name; None: not known.
    """

    network: str
    tag: str | None
    num_classes: int
    class_to_idx: Mapping[str, int]
    image_size: tuple[int, int]
    rgb_mean: tuple[float, ...]
    rgb_std: tuple[float, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    task: str = TASK
    birder_version: str | None = None
    license: str | None = None

    def build(self, **overrides: Any) -> RoPEViT:
        """The network, as far as the file says it, with random weights.

        Args:
            overrides: arguments of :func:`~rope_vit_det.models.create_model` that are not the
                file's.

        Raises:
            ValueError: :attr:`config` has an entry that this project does not know; for a wrong
                override.
        """
        own: dict[str, Any] = {"num_classes": self.num_classes, "image_size": self.image_size}
        own |= architecture_from_config(self.config, self.network)
        return create_model(self.network, **own | overrides)

    @property
    def architecture(self) -> dict[str, Any]:
        """The network's arguments of :class:`~rope_vit_det.models.RoPEViT`, after :attr:`config`.

        Raises:
            ValueError: :attr:`config` has an entry that this project does not know.
        """
        changed = architecture_from_config(self.config, self.network)
        return DEFAULTS | VARIANTS[self.network] | changed

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary arguments, those of pretraining's grid and angles among them."""
        rotary = re.compile("rope_|default_pt_grid_size")
        return {key: value for key, value in self.architecture.items() if rotary.match(key)}

    @property
    def pt_grid_size(self) -> tuple[int, int] | None:
        """(h, w) that rotary positions are scaled onto; None: they count."""
        return self.rope["default_pt_grid_size"]


def parse_config(text: str | None, option: str) -> dict[str, Any]:
    """A `config` from the JSON on a command line; {} where there is none.

    Args:
        option: of the command line, for the message.

    Raises:
        InputError: it is no JSON object.
    """
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{option} {text} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{option} {text} is not a JSON object")
    return config


def architecture_from_config(config: Mapping[str, Any], network: str | None) -> dict[str, Any]:
    """Translates a `config` of birder's into arguments of :class:`~rope_vit_det.models.RoPEViT`.

    Args:
        network: whose architecture it changes.

    Raises:
        ValueError: names the entry that cannot be translated.
    """
    ours: dict[str, Any] = {}
    for key, value in config.items():
        if key == "attn_pool_head":
            if not value:
                ours["attn_pool_num_heads"] = None
            else:  # a pooling that does not say how many heads it has has as many as the network
                num_heads = VARIANTS.get(network or "", {}).get("num_heads")
                ours.setdefault("attn_pool_num_heads", config.get("num_heads", num_heads))
        elif key not in _OUR_NAME:
            raise ValueError(
                f"its config has {key!r}: {value!r}, which this project cannot build; known are "
                + ", ".join(sorted([*_OUR_NAME, "attn_pool_head"]))
            )
        elif key in _OUR_VALUE:
            if value not in _OUR_VALUE[key]:
                raise ValueError(
                    f"its config has {key!r}: {value!r}; known are {', '.join(_OUR_VALUE[key])}"
                )
            ours[_OUR_NAME[key]] = _OUR_VALUE[key][value]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            ours[_OUR_NAME[key]] = tuple(value)
        elif key != "attn_pool_num_heads" or value is not None:
            ours[_OUR_NAME[key]] = value
    return ours
