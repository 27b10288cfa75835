"""Named architectures, as data; names and values are birder's (`birder.net._rope_vit_configs`)."""

from collections.abc import Sequence
from typing import Any

from ..errors import did_you_mean
from ..utils.arguments import is_whole_number
from .rope_vit import PtGridSize, RoPEViT

_DEMO = dict(hidden_dim=192, num_layers=4, num_heads=3, mlp_dim=768)
_TINY = dict(hidden_dim=192, num_layers=12, num_heads=3, mlp_dim=768)
_SMALL = dict(hidden_dim=384, num_layers=12, num_heads=6, mlp_dim=1536)
_MEDIUM = dict(hidden_dim=512, num_layers=12, num_heads=8, mlp_dim=2048)
_BASE = dict(hidden_dim=768, num_layers=12, num_heads=12, mlp_dim=3072, drop_path_rate=0.1)
_SO150M = dict(hidden_dim=896, num_layers=18, num_heads=16, mlp_dim=2320, drop_path_rate=0.1)
_LARGE = dict(hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, drop_path_rate=0.1)

# DeiT III (arXiv 2204.07118).
_DEIT3 = dict(pos_embed_special_tokens=False, layer_scale_init_value=1e-5)
# The rotary positions of EVA-02 (arXiv 2303.11331) and, counting from 1 with x first, of Perception
# Encoder (arXiv 2504.13181).
_EVA02_ROPE = dict(rope_rotation="interleaved", rope_temperature=10000.0)
_PE = dict(pre_norm=True, norm_eps=1e-5, rope_indexing="xy", rope_offset=1, **_EVA02_ROPE)
_PE_CORE = dict(**_PE, attn_pool_num_heads=8, attn_pool_special_tokens=True)
_PE_SPATIAL = dict(**_PE, num_reg_tokens=1, class_token=False, post_norm=False)

VARIANTS: dict[str, dict[str, Any]] = {
    "rope_vit_reg4_demo16": dict(patch_size=16, **_DEMO, num_reg_tokens=4),
    "rope_vit_t16": dict(patch_size=16, **_TINY),
    "rope_vit_t14": dict(patch_size=14, **_TINY),
    "rope_vit_s16": dict(patch_size=16, **_SMALL),
    "rope_vit_s14": dict(patch_size=14, **_SMALL),
    "rope_vit_m16": dict(patch_size=16, **_MEDIUM),
    "rope_vit_m14": dict(patch_size=14, **_MEDIUM),
    "rope_vit_b16": dict(patch_size=16, **_BASE),
    "rope_vit_b14": dict(patch_size=14, **_BASE),
    "rope_vit_l16": dict(patch_size=16, **_LARGE),
    "rope_vit_l14": dict(patch_size=14, **_LARGE),
    "rope_vit_reg1_t16": dict(patch_size=16, **_TINY, num_reg_tokens=1),
    "rope_vit_reg1_t14": dict(patch_size=14, **_TINY, num_reg_tokens=1),
    "rope_vit_reg1_s16": dict(patch_size=16, **_SMALL, num_reg_tokens=1),
    "rope_vit_reg1_s14": dict(patch_size=14, **_SMALL, num_reg_tokens=1),
    "rope_vit_reg4_m16": dict(patch_size=16, **_MEDIUM, num_reg_tokens=4),
    "rope_vit_reg4_m14": dict(patch_size=14, **_MEDIUM, num_reg_tokens=4),
    "rope_vit_reg4_b16": dict(patch_size=16, **_BASE, num_reg_tokens=4),
    "rope_vit_reg4_b14": dict(patch_size=14, **_BASE, num_reg_tokens=4),
    "rope_vit_reg4_l16": dict(patch_size=16, **_LARGE, num_reg_tokens=4),
    "rope_vit_reg4_l14": dict(patch_size=14, **_LARGE, num_reg_tokens=4),
    "rope_vit_s14_swiglu_avg": dict(patch_size=14, **_SMALL, class_token=False, mlp_layer="SwiGLU"),
    "rope_vit_m14_swiglu_avg": dict(
        patch_size=14, **_MEDIUM, class_token=False, mlp_layer="SwiGLU"
    ),
    "rope_vit_reg8_b14_nps_avg": dict(
        patch_size=14,
        **_BASE,
        num_reg_tokens=8,
        class_token=False,
        pos_embed_special_tokens=False,
    ),
    "rope_vit_reg8_so150m_p14_swiglu_rms_avg": dict(
        patch_size=14,
        **_SO150M,
        num_reg_tokens=8,
        class_token=False,
        norm_layer="RMSNorm",
        mlp_layer="SwiGLU",
    ),
    "rope_vit_reg8_so150m_p14_swiglu_rms_ap": dict(
        patch_size=14,
        **_SO150M,
        num_reg_tokens=8,
        class_token=False,
        norm_layer="RMSNorm",
        mlp_layer="SwiGLU",
        attn_pool_num_heads=16,
    ),
    "rope_deit3_m16": dict(patch_size=16, **_MEDIUM, **_DEIT3, drop_path_rate=0.1),
    "rope_deit3_m14": dict(patch_size=14, **_MEDIUM, **_DEIT3, drop_path_rate=0.1),
    "rope_deit3_reg4_t16": dict(patch_size=16, **_TINY, **_DEIT3, num_reg_tokens=4),
    "rope_deit3_reg4_m16": dict(
        patch_size=16, **_MEDIUM, **_DEIT3, num_reg_tokens=4, drop_path_rate=0.1
    ),
    "rope_deit3_reg4_m14": dict(
        patch_size=14, **_MEDIUM, **_DEIT3, num_reg_tokens=4, drop_path_rate=0.1
    ),
    "rope_i_vit_s16_pn_aps_c1": dict(patch_size=16, **_SMALL, **_PE_CORE),
    "rope_i_vit_b16_pn_aps_c1": dict(patch_size=16, **_BASE, **_PE_CORE),
    "rope_i_vit_l14_pn_aps_c1": dict(patch_size=14, **_LARGE, **_PE_CORE),
    "rope_i_vit_reg1_t16_pn_npn_avg_c1": dict(patch_size=16, **_TINY, **_PE_SPATIAL),
    "rope_i_vit_reg1_s16_pn_npn_avg_c1": dict(patch_size=16, **_SMALL, **_PE_SPATIAL),
    "rope_i_vit_reg1_b16_pn_npn_avg_c1": dict(patch_size=16, **_BASE, **_PE_SPATIAL),
    "rope_i_vit_l14_nf_swiglu_c1": dict(
        patch_size=14,
        **{**_LARGE, "mlp_dim": 2730},
        mlp_layer="NormSwiGLU",
        attn_norm=True,
        **_EVA02_ROPE,
        default_pt_grid_size=(16, 16),
    ),
}


def create_model(
    name: str,
    *,
    num_classes: int = 0,
    image_size: int | Sequence[int] | None = None,
    patch_stride: int | None = None,
    pt_grid_size: PtGridSize = None,
    window_size: int = 0,
    global_blocks: Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    cls: type[RoPEViT] = RoPEViT,
    **kwargs: Any,
) -> RoPEViT:
    """Builds a named network, with random weights.

    Args:
        name: a key of :data:`VARIANTS`.
        num_classes: 0: no classifier.
        image_size: pixels, a side or (H, W), that the position table belongs to; None: 224.
        patch_stride: None: the network's patch size.
        pt_grid_size: None: what the architecture says; "count"; or (h, w).
        window_size: 0: attention over the whole grid.
        global_blocks: None: the last block of each quarter; ignored without windows.
        drop_path_rate: None: what the architecture says.
        cls: the class to build.
        kwargs: further arguments of :class:`RoPEViT`, in which these are explained; they beat the
            architecture's.

    Raises:
        ValueError: for an unknown name or a wrong value.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise ValueError(
            f"unknown network {name!r}{did_you_mean(name, VARIANTS)}; known are "
            f"{', '.join(sorted(VARIANTS))}"
        )
    architecture = VARIANTS[name] | kwargs
    if drop_path_rate is not None:
        architecture["drop_path_rate"] = drop_path_rate
    if image_size is None:
        image_size = 224
    if is_whole_number(image_size):
        image_size = (image_size, image_size)
    return cls(
        **architecture,
        num_classes=num_classes,
        image_size=image_size,
        patch_stride=patch_stride,
        pt_grid_size=pt_grid_size,
        window_size=window_size,
        global_blocks=global_blocks,
    )
