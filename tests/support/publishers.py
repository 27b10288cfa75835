"""State dicts as the publishers of timm's networks write them, made from timm's."""

import re

import torch
from torch import Tensor

State = dict[str, Tensor]


def _renamed(state: State, *pairs: tuple[str, str]) -> State:
    out = {}
    for key, tensor in state.items():
        for pattern, new in pairs:
            key = re.sub(pattern, new, key)
        out[key] = tensor
    return out


def meta_dinov3(state: State) -> State:
    """Meta's DINOv3: one bias with a mask for the keys, whose own bias may be anything."""
    out = _renamed(
        state,
        ("^reg_token$", "storage_tokens"),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"\.fc1_g\.", ".w1."),
        (r"\.fc1_x\.", ".w2."),
    )
    if any(".w1." in key for key in out):
        out = _renamed(out, (r"\.mlp\.fc2\.", ".mlp.w3."))
    for key in [key for key in out if key.endswith(".qkv.weight")]:
        block = key.removesuffix("qkv.weight")
        zeros = torch.zeros(len(out[key]) // 3)
        q, v = out.pop(block + "q_bias", zeros), out.pop(block + "v_bias", zeros)
        out[block + "qkv.bias"] = torch.cat((q, torch.randn_like(zeros), v))
        mask = torch.ones(len(out[key]))
        mask[len(zeros) : 2 * len(zeros)] = 0
        out[block + "qkv.bias_mask"] = mask
    dim = out["cls_token"].shape[-1]
    return out | {
        "mask_token": torch.randn(1, dim),
        "rope_embed.periods": torch.ones(16),
        "local_cls_norm.weight": torch.ones(dim),
    }


def meta_perception_encoder(state: State, prefix: str) -> State:
    """Meta's Perception Encoder, within its CLIP model ("visual.") or alone ("")."""
    out = _renamed(
        state,
        (r"^patch_embed\.proj\.", "conv1."),
        ("^cls_token$", "class_embedding"),
        ("^pos_embed$", "positional_embedding"),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"(resblocks.*)\.norm([12])\.", r"\1.ln_\2."),
        (r"\.gamma_([12])$", r".ls_\1.gamma"),
        (r"(resblocks.*)\.qkv\.(weight|bias)", r"\1.in_proj_\2"),
        (r"(resblocks.*attn)\.proj\.", r"\1.out_proj."),
        (r"\.fc1\.", ".c_fc."),
        (r"\.fc2\.", ".c_proj."),
        (r"^attn_pool\.norm\.", "attn_pool.layernorm."),
        (r"^attn_pool\.latent$", "attn_pool.probe"),
        (r"^attn_pool\.proj\.", "attn_pool.attn.out_proj."),
    )
    for kind in ("weight", "bias"):
        if f"attn_pool.q.{kind}" in out:
            joint = torch.cat((out.pop(f"attn_pool.q.{kind}"), out.pop(f"attn_pool.kv.{kind}")))
            out[f"attn_pool.attn.in_proj_{kind}"] = joint
    if "head.weight" in out:
        out["proj"] = out.pop("head.weight").T.contiguous()
        out.pop("head.bias")
    for key in ("class_embedding", "positional_embedding"):
        if key in out:
            out[key] = out[key].squeeze()
    out = {prefix + key: tensor for key, tensor in out.items()}
    if prefix:
        out |= {"transformer.resblocks.0.ln_1.weight": torch.ones(7), "logit_scale": torch.ones(())}
    return out


def eva02(state: State, prefix: str) -> State:
    """EVA-02's, alone ("") or within its CLIP model ("visual.")."""
    out = _renamed(
        state,
        (r"\.q_proj\.bias$", ".q_bias"),
        (r"\.v_proj\.bias$", ".v_bias"),
        (r"\.fc1_g\.", ".w1."),
        (r"\.fc1_x\.", ".w2."),
        (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
        (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
    )
    if any(".w1." in key for key in out):
        out = _renamed(out, (r"\.mlp\.fc2\.", ".mlp.w3."))
    else:
        out = _renamed(out, (r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
    out |= {"rope.freqs_cos": torch.ones(4, 4), "rope.freqs_sin": torch.ones(4, 4)}
    out = {prefix + key: tensor for key, tensor in out.items()}
    return out | ({"text.ln_final.weight": torch.ones(7)} if prefix else {})
