"""Named architectures, as data.

Names and values are birder's (`birder.net._rope_vit_configs`) and timm's (`timm.models.eva`).
"""

import re
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, did_you_mean
from ..utils.arguments import to_pair
from .rope_vit import PtGridSize, RoPEViT

_P14, _P16 = dict(patch_size=14), dict(patch_size=16)
_DEMO = dict(hidden_dim=192, num_layers=4, num_heads=3, mlp_dim=768)
_TINY = dict(hidden_dim=192, num_layers=12, num_heads=3, mlp_dim=768)
_SMALL = dict(hidden_dim=384, num_layers=12, num_heads=6, mlp_dim=1536)
_MEDIUM = dict(hidden_dim=512, num_layers=12, num_heads=8, mlp_dim=2048)
_BASE = dict(hidden_dim=768, num_layers=12, num_heads=12, mlp_dim=3072, drop_path_rate=0.1)
_LARGE = dict(hidden_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, drop_path_rate=0.1)
_REG1, _REG4, _REG8 = (dict(num_reg_tokens=number) for number in (1, 4, 8))
# Without a class token; tables without entries for the special tokens; gated feed-forward layers.
_AVG, _NPS = dict(class_token=False), dict(pos_embed_special_tokens=False)
_SWIGLU, _RMS = dict(mlp_layer="SwiGLU"), dict(norm_layer="RMSNorm")
_GRID16 = dict(default_pt_grid_size=(16, 16))
_SO150M = dict(hidden_dim=896, num_layers=18, num_heads=16, mlp_dim=2320, drop_path_rate=0.1)
_SO150M_P14 = _P14 | _SO150M | _REG8 | _AVG | _RMS | _SWIGLU

# DeiT III (arXiv 2204.07118).
_DEIT3 = _NPS | dict(layer_scale_init_value=1e-5)
_DEIT3_M = _MEDIUM | _DEIT3 | dict(drop_path_rate=0.1)
# The rotary positions of EVA-02 (arXiv 2303.11331) and, counting from 1 with x first, of Perception
# Encoder (arXiv 2504.13181).
_EVA02_ROPE = dict(rope_rotation="interleaved", rope_temperature=10000.0)
_NF = _GRID16 | dict(mlp_dim=2730, mlp_layer="NormSwiGLU", attn_norm=True)
_PE = dict(pre_norm=True, norm_eps=1e-5, rope_indexing="xy", rope_offset=1, **_EVA02_ROPE)
_PE_POOL = dict(attn_pool_num_heads=8, attn_pool_special_tokens=True)
_PE_SPATIAL = _PE | _REG1 | _AVG | dict(post_norm=False)

VARIANTS: dict[str, dict[str, Any]] = {
    "rope_vit_reg4_demo16": _P16 | _DEMO | _REG4,
    "rope_vit_t16": _P16 | _TINY,
    "rope_vit_t14": _P14 | _TINY,
    "rope_vit_s16": _P16 | _SMALL,
    "rope_vit_s14": _P14 | _SMALL,
    "rope_vit_m16": _P16 | _MEDIUM,
    "rope_vit_m14": _P14 | _MEDIUM,
    "rope_vit_b16": _P16 | _BASE,
    "rope_vit_b14": _P14 | _BASE,
    "rope_vit_l16": _P16 | _LARGE,
    "rope_vit_l14": _P14 | _LARGE,
    "rope_vit_reg1_t16": _P16 | _TINY | _REG1,
    "rope_vit_reg1_t14": _P14 | _TINY | _REG1,
    "rope_vit_reg1_s16": _P16 | _SMALL | _REG1,
    "rope_vit_reg1_s14": _P14 | _SMALL | _REG1,
    "rope_vit_reg4_m16": _P16 | _MEDIUM | _REG4,
    "rope_vit_reg4_m14": _P14 | _MEDIUM | _REG4,
    "rope_vit_reg4_b16": _P16 | _BASE | _REG4,
    "rope_vit_reg4_b14": _P14 | _BASE | _REG4,
    "rope_vit_reg4_l16": _P16 | _LARGE | _REG4,
    "rope_vit_reg4_l14": _P14 | _LARGE | _REG4,
    "rope_vit_s14_swiglu_avg": _P14 | _SMALL | _AVG | _SWIGLU,
    "rope_vit_m14_swiglu_avg": _P14 | _MEDIUM | _AVG | _SWIGLU,
    "rope_vit_reg8_b14_nps_avg": _P14 | _BASE | _REG8 | _AVG | _NPS,
    "rope_vit_reg8_so150m_p14_swiglu_rms_avg": _SO150M_P14,
    "rope_vit_reg8_so150m_p14_swiglu_rms_ap": _SO150M_P14 | dict(attn_pool_num_heads=16),
    "rope_deit3_m16": _P16 | _DEIT3_M,
    "rope_deit3_m14": _P14 | _DEIT3_M,
    "rope_deit3_reg4_t16": _P16 | _TINY | _DEIT3 | _REG4,
    "rope_deit3_reg4_m16": _P16 | _DEIT3_M | _REG4,
    "rope_deit3_reg4_m14": _P14 | _DEIT3_M | _REG4,
    "rope_i_vit_s16_pn_aps_c1": _P16 | _SMALL | _PE | _PE_POOL,
    "rope_i_vit_b16_pn_aps_c1": _P16 | _BASE | _PE | _PE_POOL,
    "rope_i_vit_l14_pn_aps_c1": _P14 | _LARGE | _PE | _PE_POOL,
    "rope_i_vit_reg1_t16_pn_npn_avg_c1": _P16 | _TINY | _PE_SPATIAL,
    "rope_i_vit_reg1_s16_pn_npn_avg_c1": _P16 | _SMALL | _PE_SPATIAL,
    "rope_i_vit_reg1_b16_pn_npn_avg_c1": _P16 | _BASE | _PE_SPATIAL,
    "rope_i_vit_l14_nf_swiglu_c1": _P14 | _LARGE | _NF | _EVA02_ROPE,
}


# timm's (Apache-2.0): DINOv3 (arXiv 2508.10104), LingBot-Vision (arXiv 2607.05247), EVA-02 (arXiv
# 2303.11331), Perception Encoder (arXiv 2504.13181), RoPE-ViT (arXiv 2403.13298) and timm itself.
# Their position tables are interpolated with antialiasing.
_TIMM = dict(drop_path_rate=0.0, pos_embed_antialias=True)
_QKVB = dict(qkv_bias="qv")
# DINOv3's and timm's own have none, and were trained at 256 pixels.
_NO_TABLE = (
    _TIMM | _P16 | _GRID16 | dict(image_size=256, pos_embed=False, layer_scale_init_value=1e-5)
)
_DINOV3_ROPE = dict(rope_angles="tiled", rope_centred=True)
_DINOV3 = _NO_TABLE | _REG4 | _DINOV3_ROPE | dict(qkv_bias="", norm_eps=1e-5, pooling="mean")
_LINGBOT = _DINOV3 | dict(image_size=512, pooling="class_token", default_pt_grid_size=(32, 32))
_HUGE = dict(hidden_dim=1280, num_layers=32, num_heads=20, mlp_dim=5120)
_7B = dict(hidden_dim=4096, num_layers=40, num_heads=32, mlp_dim=8192)
_GIANT = dict(hidden_dim=1536, num_layers=40, num_heads=24, mlp_dim=4096)
_EVA02_POOL = dict(pooling="mean", norm_pooled=True)
_EVA02 = _TIMM | _P14 | _SWIGLU | _QKVB | _GRID16 | _EVA02_ROPE | _EVA02_POOL
_EVA02_T, _EVA02_S = _EVA02 | _TINY | dict(mlp_dim=512), _EVA02 | _SMALL | dict(mlp_dim=1024)
_EVA02_B = _BASE | _EVA02 | dict(mlp_dim=2048, mlp_layer="NormSwiGLU")
_EVA02_L = _LARGE | _EVA02 | dict(mlp_dim=2730, mlp_layer="NormSwiGLU")
_EVA02_CLIP = dict(attn_norm=True, pooling="class_token", norm_pooled=False)
_GIGANTIC = dict(
    hidden_dim=1536, num_layers=50, num_heads=16, mlp_dim=8960, class_token=False, rope_offset=0
)


def _pe(size: dict[str, Any], patch_size: int, image_size: int, **more: Any) -> dict[str, Any]:
    grid = (image_size // patch_size, image_size // patch_size)
    sizes = dict(patch_size=patch_size, image_size=image_size, default_pt_grid_size=grid)
    return _PE | size | _TIMM | sizes | more


_PE_DENSE = dict(post_norm=False, pooling="mean")
_PE_LANG = dict(**_PE_DENSE, layer_scale_init_value=0.1)


def _naver(size: dict[str, Any], *, mixed: bool, table: bool) -> dict[str, Any]:
    rope = dict(rope_rotation="interleaved", rope_indexing="xy", rope_learned=mixed)
    rope |= dict(rope_temperature=10.0 if mixed else 100.0)
    return size | _TIMM | _P16 | _DEIT3 | rope | dict(pos_embed=table)


_SBB = _NO_TABLE | _REG1 | _AVG | _QKVB | _EVA02_ROPE | dict(num_layers=12, norm_pooled=True)
_BETWIXT = dict(hidden_dim=640, num_heads=10, mlp_dim=2560)

VARIANTS |= {
    "vit_tiny_patch16_dinov3_qkvb": _TINY | _DINOV3 | _QKVB,
    "vit_small_patch16_dinov3": _SMALL | _DINOV3,
    "vit_small_patch16_dinov3_qkvb": _SMALL | _DINOV3 | _QKVB,
    "vit_small_plus_patch16_dinov3": _SMALL | _DINOV3 | _SWIGLU,
    "vit_small_plus_patch16_dinov3_qkvb": _SMALL | _DINOV3 | _SWIGLU | _QKVB,
    "vit_base_patch16_dinov3": _BASE | _DINOV3,
    "vit_base_patch16_dinov3_qkvb": _BASE | _DINOV3 | _QKVB,
    "vit_large_patch16_dinov3": _LARGE | _DINOV3,
    "vit_large_patch16_dinov3_qkvb": _LARGE | _DINOV3 | _QKVB,
    "vit_huge_plus_patch16_dinov3": _HUGE | _DINOV3 | _SWIGLU,
    "vit_huge_plus_patch16_dinov3_qkvb": _HUGE | _DINOV3 | _SWIGLU | _QKVB,
    "vit_7b_patch16_dinov3": _7B | _DINOV3 | _SWIGLU,
    "vit_small_patch16_lingbot": _SMALL | _LINGBOT | _QKVB,
    "vit_base_patch16_lingbot": _BASE | _LINGBOT | _QKVB,
    "vit_large_patch16_lingbot": _LARGE | _LINGBOT | _QKVB,
    "vit_giant_patch16_lingbot": _GIANT | _LINGBOT | _SWIGLU,
    "eva02_tiny_patch14_224": _EVA02_T,
    "eva02_tiny_patch14_336": _EVA02_T | dict(image_size=336),
    "eva02_small_patch14_224": _EVA02_S,
    "eva02_small_patch14_336": _EVA02_S | dict(image_size=336),
    "eva02_base_patch14_224": _EVA02_B,
    "eva02_base_patch14_448": _EVA02_B | dict(image_size=448),
    "eva02_large_patch14_224": _EVA02_L,
    "eva02_large_patch14_448": _EVA02_L | dict(image_size=448),
    "eva02_base_patch16_clip_224": _EVA02_B | _EVA02_CLIP | dict(patch_size=16),
    "eva02_large_patch14_clip_224": _EVA02_L | _EVA02_CLIP,
    "eva02_large_patch14_clip_336": _EVA02_L | _EVA02_CLIP | dict(image_size=336),
    "vit_pe_core_tiny_patch16_384": _pe(_TINY, 16, 384, **_PE_POOL),
    "vit_pe_core_small_patch16_384": _pe(_SMALL, 16, 384, **_PE_POOL),
    "vit_pe_core_base_patch16_224": _pe(_BASE, 16, 224, **_PE_POOL),
    "vit_pe_core_large_patch14_336": _pe(_LARGE, 14, 336, **_PE_POOL),
    "vit_pe_core_gigantic_patch14_448": _pe(_GIGANTIC, 14, 448, **_PE_POOL, attn_pool_mlp_dim=6144),
    "vit_pe_lang_large_patch14_448": _pe(_LARGE, 14, 448, **_PE_LANG, num_layers=23),
    "vit_pe_lang_gigantic_patch14_448": _pe(_GIGANTIC, 14, 448, **_PE_LANG, num_layers=47),
    "vit_pe_spatial_tiny_patch16_512": _pe(_TINY, 16, 512, **_PE_DENSE),
    "vit_pe_spatial_small_patch16_512": _pe(_SMALL, 16, 512, **_PE_DENSE),
    "vit_pe_spatial_base_patch16_512": _pe(_BASE, 16, 512, **_PE_DENSE),
    "vit_pe_spatial_large_patch14_448": _pe(_LARGE, 14, 448, **_PE_DENSE),
    "vit_pe_spatial_gigantic_patch14_448": _pe(_GIGANTIC, 14, 448, **_PE_LANG),
    **{
        f"vit_{size}_patch16_rope{'_mixed' * mixed}{'_ape' * table}_224": _naver(
            sizes, mixed=mixed, table=table
        )
        for size, sizes in (("small", _SMALL), ("base", _BASE), ("large", _LARGE))
        for mixed in (False, True)
        for table in (False, True)
    },
    "vit_medium_patch16_rope_reg1_gap_256": _MEDIUM | _SBB,
    "vit_mediumd_patch16_rope_reg1_gap_256": _MEDIUM | _SBB | dict(num_layers=20, qkv_bias=""),
    "vit_betwixt_patch16_rope_reg4_gap_256": _BETWIXT | _SBB | _REG4,
    "vit_base_patch16_rope_reg1_gap_256": _BASE | _SBB,
}
# What somebody may ask for, and why it is not here.
_LEFT_OUT = (
    (r"eva02_enormous_|eva_", "it has no rotary positions"),
    (r"vit_\w+_sapiens2", "Sapiens2's networks, with grouped queries, are not built here"),
)


def is_birders(name: str) -> bool:
    """Whether a named network is birder's, or one of our own beside them; else it is timm's."""
    return name.startswith("rope_")


def default_image_size(name: str) -> int:
    """The side, in pixels, of the images that a named network was trained at."""
    size: int = VARIANTS[name].get("image_size", 224)
    return size


def check_network(name: Any, prefix: str = "") -> None:
    """
    Args:
        prefix: of the message, such as "--network: ".

    Raises:
        InputError: there is no such network; says which name is close, or why it is left out.
    """
    if isinstance(name, str) and name in VARIANTS:
        return
    for pattern, reason in _LEFT_OUT:
        if re.match(pattern, str(name)):
            raise InputError(f"{prefix}network {name!r} cannot be used: {reason}")
    raise InputError(
        f"{prefix}unknown network {name!r}{did_you_mean(name, VARIANTS)}; allowed: "
        f"{', '.join(sorted(VARIANTS))}"
    )


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
        image_size: pixels, a side or (H, W), that the position table belongs to; None: that of
            the network's training (:func:`default_image_size`).
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
    check_network(name)
    architecture = VARIANTS[name] | kwargs
    if drop_path_rate is not None:
        architecture["drop_path_rate"] = drop_path_rate
    if image_size is None:
        image_size = default_image_size(name)
    architecture["image_size"] = to_pair(image_size)
    return cls(
        **architecture,
        num_classes=num_classes,
        patch_stride=patch_stride,
        pt_grid_size=pt_grid_size,
        window_size=window_size,
        global_blocks=global_blocks,
    )
