"""What a weights file says about its network, in birder's terms and in ours."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..models.variants import VARIANTS

TASK = "image_classification"
# The version of birder whose file format is written.
BIRDER_VERSION = "v0.8.4"

_SAME_NAME = (
    "patch_size",
    "num_layers",
    "num_heads",
    "hidden_dim",
    "mlp_dim",
    "drop_path_rate",
    "layer_scale_init_value",
    "num_reg_tokens",
    "class_token",
    "pos_embed_special_tokens",
    "pre_norm",
    "post_norm",
    "attn_norm",
    "attn_pool_num_heads",
    "attn_pool_special_tokens",
)
_OUR_NAME = {key: key for key in _SAME_NAME} | {
    "norm_layer_type": "norm_layer",
    "norm_layer_eps": "norm_eps",
    "mlp_layer_type": "mlp_layer",
    "rope_rot_type": "rope_rotation",
    "rope_grid_indexing": "rope_indexing",
    "rope_grid_offset": "rope_offset",
    "rope_temperature": "rope_temperature",
    "pt_grid_size": "default_pt_grid_size",
}
_OUR_VALUE = {
    "mlp_layer_type": {
        "FFN": "FeedForward",
        "SwiGLU_FFN": "SwiGLU",
        "Norm_SwiGLU_FFN": "NormSwiGLU",
    },
    "rope_rot_type": {"standard": "halves", "interleaved": "interleaved"},
}
_ROPE = {
    "rope_rotation": "halves",
    "rope_indexing": "ij",
    "rope_offset": 0,
    "rope_temperature": 100.0,
    "default_pt_grid_size": None,
}


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
        config: what the file changes in the architecture, with birder's keys; empty: nothing.
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

    @property
    def signature(self) -> dict[str, list[dict[str, list[int]]]]:
        """Shapes of inputs and outputs, as birder writes them."""
        return {
            "inputs": [{"data_shape": [0, 3, *self.image_size]}],
            "outputs": [{"data_shape": [0, self.num_classes]}],
        }

    @property
    def architecture(self) -> dict[str, Any]:
        """The network's arguments of :class:`~rope_vit_det.models.RoPEViT`, after :attr:`config`.

        Raises:
            ValueError: :attr:`config` has an entry that this project does not know.
        """
        return VARIANTS[self.network] | architecture_from_config(self.config, self.network)

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary arguments: rotation, indexing, offset, temperature and pretraining grid."""
        architecture = self.architecture
        return {key: architecture.get(key, default) for key, default in _ROPE.items()}

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
        elif key in _OUR_VALUE and value not in _OUR_VALUE[key]:
            raise ValueError(
                f"its config has {key!r}: {value!r}; known are {', '.join(_OUR_VALUE[key])}"
            )
        elif key in _OUR_VALUE:
            ours[_OUR_NAME[key]] = _OUR_VALUE[key][value]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            ours[_OUR_NAME[key]] = tuple(value)
        elif key != "attn_pool_num_heads" or value is not None:
            ours[_OUR_NAME[key]] = value
    return ours
