"""The vision transformer with rotary positions, register tokens and windowed attention.

Parameter names and shapes are birder's (`birder.net.rope_vit`), so weights go both ways.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers.attention import QKVBias, kernels_for_any_size
from ..layers.cpu import is_slow_bf16_autocast
from ..layers.graphs import is_building_graph
from ..layers.lora import add_adapter
from ..layers.patch_embed import PatchEmbed, interpolate_position_table
from ..layers.pooling import AttentionPool
from ..layers.rope import Angles, Indexing, RotaryEmbedding2D, Rotation, random_scale
from ..layers.windows import from_windows, to_windows, window_groups
from ..utils.arguments import (
    FLAG,
    Rule,
    are_blocks,
    check_argument,
    check_rule,
    is_pair,
    is_whole_number,
    number,
    one_of,
    optional,
    to_pair,
    whole,
)
from ..utils.torch_private import compile_settings, graph_options, mark_dynamic
from .encoder import Encoder, EncoderBlock, MLPLayer

# There is a graph for each combination of: the kinds of edge windows (about 15), batches of one or
# more images, training or inference, precision.
_MAX_GRAPHS = 256

PtGridSize = tuple[int, int] | Literal["count"] | None
Pooling = Literal["class_token", "mean"] | None
Norm = Literal["LayerNorm", "RMSNorm"]


class RoPEViT(nn.Module):
    """A plain ViT: patch stem, encoder blocks, pooling, classifier.

    Tokens stand in the order [registers, class token, patches]. The three uses of the network are
    :meth:`detection_features` (patch tokens before the final norm), :meth:`embedding` and calling
    it (logits).
    """

    def __init__(
        self,
        *,
        patch_size: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        num_reg_tokens: int = 0,
        class_token: bool = True,
        pos_embed: bool = True,
        pos_embed_special_tokens: bool = True,
        pos_embed_antialias: bool = False,
        pre_norm: bool = False,
        post_norm: bool = True,
        norm_layer: Norm = "LayerNorm",
        norm_eps: float = 1e-6,
        mlp_layer: MLPLayer = "FeedForward",
        attn_norm: bool = False,
        qkv_bias: QKVBias = "qkv",
        layer_scale_init_value: float | None = None,
        pooling: Pooling = None,
        norm_pooled: bool = False,
        attn_pool_num_heads: int | None = None,
        attn_pool_mlp_dim: int | None = None,
        attn_pool_special_tokens: bool = False,
        rope_rotation: Rotation = "halves",
        rope_indexing: Indexing = "ij",
        rope_offset: int = 0,
        rope_temperature: float = 100.0,
        rope_angles: Angles = "repeated",
        rope_centred: bool = False,
        rope_learned: bool = False,
        default_pt_grid_size: tuple[int, int] | None = None,
        num_classes: int = 0,
        image_size: tuple[int, int] = (224, 224),
        patch_stride: int | None = None,
        pt_grid_size: PtGridSize = None,
        window_size: int = 0,
        global_blocks: Sequence[int] | None = None,
        tile_pos_embed: bool = False,
        rescale_coords: float | None = None,
        drop_path_rate: float = 0.0,
        activation_checkpoint: bool = False,
        compile: bool = False,
        features_only: bool = False,
    ) -> None:
        """
        Args:
            patch_size: height and width of the patch kernel, in pixels.
            num_layers: encoder blocks.
            num_heads: of the attention; ``hidden_dim`` is a multiple of it.
            hidden_dim: channels of a token.
            mlp_dim: hidden channels of the feed-forward layers.
            num_reg_tokens, class_token: the special tokens.
            pos_embed: whether there is a learned absolute position table.
            pos_embed_special_tokens: whether it has entries for the special tokens.
            pos_embed_antialias: whether it is interpolated with antialiasing.
            pre_norm: normalises the tokens before the first block (the stem then has no bias).
            norm_layer, norm_eps: class in ``torch.nn`` of all norms, and their epsilon.
            mlp_layer: linear, GELU, linear; or gated (SwiGLU), with a norm before its last layer.
            qkv_bias: which of queries, keys and values have a bias: all, "qv" or none ("").
            layer_scale_init_value: of the learned scale of each residual branch; None: no scale.
            post_norm: normalises them after the last one (not for :meth:`detection_features`).
            attn_norm: normalises the attention output before its projection.
            pooling: the embedding is the class token or the mean of the patch tokens. None: the
                class token, where there is one.
            norm_pooled: the last norm is that of the embedding, not of the tokens.
            attn_pool_num_heads: pools by attention instead; None: does not.
            attn_pool_mlp_dim: hidden channels of its feed-forward layer; None: ``mlp_dim``.
            attn_pool_special_tokens: whether that attention sees the special tokens.
            rope_rotation, rope_indexing, rope_offset, rope_temperature, rope_angles: see
                :class:`~rope_vit_det.layers.rope.RotaryEmbedding2D`.
            rope_centred: positions run from the centre, from -1 to 1 over ``default_pt_grid_size``.
            rope_learned: every block learns the frequencies of its heads.
            default_pt_grid_size: what ``pt_grid_size=None`` means; None: positions count.
            num_classes: 0: no classifier, calling the model returns the embedding.
            image_size: (H, W) in pixels that the absolute position table belongs to.
            patch_stride: pixels between patches; the kernel is resampled to that size. None: the
                patch size.
            pt_grid_size: see :attr:`pt_grid_size`.
            window_size: tokens along a side of the attention windows; 0: attention over the whole
                grid in every block.
            global_blocks: indices of the blocks that attend over the whole grid all the same;
                None: the last block of each quarter.
            tile_pos_embed: how the absolute position table meets a larger grid. False: it is
                interpolated over the whole grid, as in birder. True: it is repeated in tiles of
                one window each (without windows: of its own grid), cropped at the edges.
            rescale_coords: in training, all rotary positions of a forward pass are multiplied by
                a random factor between 1 / rescale_coords and rescale_coords
                (:func:`~rope_vit_det.layers.rope.random_scale`); None: they are not.
            drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the
                first (arXiv 1603.09382).
            activation_checkpoint: recomputes each block's activations in the backward pass.
            compile: runs the blocks through `torch.compile`. Without windows, all sizes share one
                graph; with windows, those do that have the same kinds of edge windows.
            features_only: leaves out final norm, pooling and classifier; only
                :meth:`detection_features` works.
        """
        super().__init__()
        is_size = is_pair(image_size) and not any(side % patch_size for side in image_size)
        allowed = f"a side in pixels or [h, w], multiples of the patch size {patch_size}"
        check_argument("image_size", image_size, is_size, allowed)
        check_rule("patch_stride", patch_stride, optional(whole(1), f"the patch size {patch_size}"))
        check_rule("window_size", window_size, whole(0, " (0: no windows)"))
        check_rule("tile_pos_embed", tile_pos_embed, FLAG)
        check_rule("activation_checkpoint", activation_checkpoint, FLAG)
        check_rule("compile", compile, FLAG)
        check_rule("rescale_coords", rescale_coords, optional(number(1), "off"))
        check_rule("drop_path_rate", drop_path_rate, number(0, 1, or_most=False))
        check_rule("num_classes", num_classes, whole(0, " (0: no classifier)"))
        check_rule("norm_layer", norm_layer, one_of(get_args(Norm)))
        check_rule("mlp_layer", mlp_layer, one_of(get_args(MLPLayer)))
        check_rule("qkv_bias", qkv_bias, one_of(get_args(QKVBias)))
        check_rule("rope_rotation", rope_rotation, one_of(get_args(Rotation)))
        check_rule("rope_indexing", rope_indexing, one_of(get_args(Indexing)))
        check_rule("rope_angles", rope_angles, one_of(get_args(Angles)))
        check_rule("pooling", pooling, _poolings(class_token))
        are_known = global_blocks is None or are_blocks(global_blocks, num_layers)
        indices = f"a list of block indices in 0..{num_layers - 1}"
        allowed = f"None (the last block of each quarter) or {indices}"
        check_argument("global_blocks", global_blocks, are_known, allowed)
        allowed = "False for a network without an absolute position table"
        check_argument("tile_pos_embed", tile_pos_embed, pos_embed or not tile_pos_embed, allowed)
        if features_only:
            check_argument("num_classes", num_classes, not num_classes, "0 with features_only")
        if global_blocks is None:
            global_blocks = [max(num_layers * quarter // 4 - 1, 0) for quarter in (1, 2, 3, 4)]
        self.patch_size = patch_size
        self.patch_stride = patch_size if patch_stride is None else patch_stride
        self.hidden_dim = hidden_dim
        self.num_classes = num_classes
        self.num_reg_tokens = num_reg_tokens
        self.num_special_tokens = num_reg_tokens + int(class_token)
        self.window_size = window_size
        self.global_blocks = frozenset(global_blocks)
        self.tile_pos_embed = tile_pos_embed
        self.rescale_coords = rescale_coords
        self.features_only = features_only
        self.activation_checkpoint = activation_checkpoint
        self.compiled = compile
        self._compiled_blocks: dict[bool, Callable[..., Tensor]] = {}
        self._trained_shapes: set[tuple[int, ...]] = set()
        self.pooling = pooling or ("class_token" if class_token else "mean")
        self.norm_pooled = norm_pooled
        self.attn_pool_special_tokens = attn_pool_special_tokens
        self.default_pt_grid_size = default_pt_grid_size
        self.pt_grid_size = pt_grid_size
        self.pos_grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.pos_special_tokens = self.num_special_tokens if pos_embed_special_tokens else 0

        norm = partial(getattr(nn, norm_layer), eps=norm_eps)
        self.conv_proj = PatchEmbed(3, hidden_dim, patch_size, self.patch_stride, bias=not pre_norm)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim)) if class_token else None
        self.reg_tokens = (
            nn.Parameter(torch.zeros(1, num_reg_tokens, hidden_dim)) if num_reg_tokens else None
        )
        self.pos_embed_antialias = pos_embed_antialias
        self.pos_embedding = None
        if pos_embed:
            length = self.pos_special_tokens + self.pos_grid[0] * self.pos_grid[1]
            self.pos_embedding = nn.Parameter(torch.empty(1, length, hidden_dim).normal_(std=0.02))
        self.rope = RotaryEmbedding2D(
            hidden_dim // num_heads,
            temperature=rope_temperature,
            indexing=rope_indexing,
            offset=rope_offset,
            rotation=rope_rotation,
            angles=rope_angles,
            unit_grid=default_pt_grid_size if rope_centred else None,
            learned=rope_learned,
        )
        self.encoder = Encoder(
            [
                EncoderBlock(
                    hidden_dim,
                    num_heads,
                    mlp_dim,
                    num_special_tokens=self.num_special_tokens,
                    norm=norm,
                    mlp_layer=mlp_layer,
                    attn_norm=attn_norm,
                    layer_scale_init_value=layer_scale_init_value,
                    drop_path=drop_path_rate * i / max(num_layers - 1, 1),
                    rotation=rope_rotation,
                    qkv_bias=qkv_bias,
                    learned_rope_temperature=rope_temperature if rope_learned else None,
                )
                for i in range(num_layers)
            ],
            pre_norm=norm(hidden_dim) if pre_norm else None,
        )
        self.norm = norm(hidden_dim) if post_norm and not features_only else nn.Identity()
        self.attn_pool = None
        if attn_pool_num_heads is not None and not features_only:
            self.attn_pool = AttentionPool(
                hidden_dim, attn_pool_num_heads, attn_pool_mlp_dim or mlp_dim
            )
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            self.classifier = nn.Linear(hidden_dim, num_classes)
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)

    @property
    def pt_grid_size(self) -> PtGridSize:
        """How rotary positions meet a grid other than the one of pretraining; may be assigned.

        (h, w) scales the positions of whatever grid attention sees (the image's, or a window's)
        onto h x w cells; "count" lets them count on; None is what the architecture says.
        """
        return self._pt_grid_size

    @pt_grid_size.setter
    def pt_grid_size(self, value: PtGridSize) -> None:
        check_argument(
            "pt_grid_size",
            value,
            value is None or value == "count" or is_pair(value),
            'None, "count" or [h, w], whole numbers of 1 or more',
        )
        self._pt_grid_size: PtGridSize = to_pair(value)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes), or embeddings without a classifier."""
        return self.classifier(self.embedding(x))

    def embedding(self, x: Tensor, *, pooling: Pooling = None) -> Tensor:
        """Images (N, 3, H, W), multiples of the patch stride, to embeddings (N, hidden_dim).

        Args:
            pooling: the class token or the mean of the patch tokens in place of the network's own
                pooling; None: that.

        Raises:
            RuntimeError: the network was built for features only.
        """
        if self.features_only:
            raise RuntimeError(
                "a network for features only has no final norm, pooling and classifier: call "
                "detection_features(), or build one with rope_vit_det.create_model"
            )
        check_rule("pooling", pooling, _poolings(self.class_token is not None))
        x, _ = self._encode(x)
        if not self.norm_pooled:
            x = self.norm(x)
        patches = x[:, self.num_special_tokens :]
        if self.attn_pool is not None and pooling is None:
            x = self.attn_pool(x if self.attn_pool_special_tokens else patches)
        elif (pooling or self.pooling) == "mean":
            x = patches.mean(dim=1)
        else:
            x = x[:, self.num_reg_tokens]
        return self.norm(x) if self.norm_pooled else x

    def detection_features(self, x: Tensor) -> dict[str, Tensor]:
        """The patch tokens after the last block, before the final norm, as a feature map.

        Args:
            x: images (N, 3, H, W); H and W must be multiples of the patch stride.

        Returns:
            dict: "neck", a tensor (N, hidden_dim, H / stride, W / stride).
        """
        x, grid = self._encode(x)
        x = x[:, self.num_special_tokens :]
        window = self._window(grid)
        x = x.unflatten(1, grid) if window is None else from_windows(x, grid, window)
        return {"neck": x.permute(0, 3, 1, 2)}

    def _encode(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """:meth:`_tokens`, without an autocast to bf16 that would cost time on this CPU."""
        if is_slow_bf16_autocast(x.device) and self.conv_proj.weight.dtype == torch.float32:
            with torch.autocast("cpu", enabled=False):
                return self._tokens(x.float())
        return self._tokens(x)

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images to all tokens after the last block, and the grid (h, w) of the patch tokens.

        With windows, the patch tokens come window by window (:mod:`~rope_vit_det.layers.windows`).
        """
        height, width = x.shape[-2:]
        stride = self.patch_stride
        if height % stride or width % stride or not (height and width):
            raise ValueError(
                f"images of {height}x{width} px must be padded to a multiple of the patch stride "
                f"({stride}) in height and width"
            )
        x = self.conv_proj(x)  # (N, C, h, w)
        grid = (x.shape[2], x.shape[3])
        window = self._window(grid)
        x = self._add_special_tokens(x.flatten(2).transpose(1, 2), grid)  # (N, S + h*w, C)
        if window is not None:
            s = self.num_special_tokens
            x = torch.cat((x[:, :s], to_windows(x[:, s:].unflatten(1, grid), window)), dim=1)

        x = self.encoder.pre_block(x)
        scale = None
        if self.training and self.rescale_coords is not None:
            scale = random_scale(self.rescale_coords, x.device)
        table = partial(
            self.rope,
            grid,
            windowed_order=window,
            pt_grid_size=self._effective_pt_grid_size(),
            num_special_tokens=self.num_special_tokens,
            scale=scale,
            device=x.device,
            # Learned frequencies meet positions, which are the same for all of them.
            dtype=torch.float32 if self.rope.learned else self._attention_dtype(x),
        )
        global_rope = table()
        window_rope = windows = None
        if window is not None:
            window_rope, windows = table(window=window), window_groups(grid, window)
        run, is_any_size = _run_block, self._is_any_size(x)
        if self.compiled and not is_building_graph():
            run = self._compiled_block(x, is_any_size)
        # In a network that was cast to bf16, the sum of all branches is what rounding hurts most.
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        recompute = self.activation_checkpoint and torch.is_grad_enabled()
        with kernels_for_any_size() if is_any_size else nullcontext():
            for i, block in enumerate(self.encoder.block):
                if windows is None or i in self.global_blocks:
                    x = run(block, recompute, x, global_rope)
                else:
                    x = run(block, recompute, x, window_rope, windows)
        return x.to(dtype), grid

    def _is_any_size(self, x: Tensor) -> bool:
        """Whether what is made for this size of tokens should serve others.

        In training it need not while there is but one size, as with large-scale jitter.
        """
        if is_building_graph():  # whose kernels belong to whoever builds it
            return False
        if self.training and len(self._trained_shapes) < 2:
            self._trained_shapes.add(tuple(x.shape))
        return not self.training or self._trained_shapes != {tuple(x.shape)}

    def _compiled_block(self, x: Tensor, dynamic: bool) -> Callable[..., Tensor]:
        """:func:`_run_block` as a graph that all blocks share.

        To a block, a size is a number of tokens. What draws random numbers by a block's own rate
        stays outside, as do stem, position table and rotary tables.

        Args:
            x: (B, S + N, C), of the first block.
            dynamic: whether it is for any size.
        """
        if dynamic not in self._compiled_blocks:
            self._compiled_blocks[dynamic] = torch.compile(
                _run_block, fullgraph=True, dynamic=dynamic, options=graph_options(x, dynamic)
            )
        compiled = self._compiled_blocks[dynamic]

        def run(
            block: EncoderBlock, recompute: bool, x: Tensor, rope: Tensor, *windows: Any
        ) -> Tensor:
            kept = block.draw_kept(x)
            if dynamic:  # a size that happens to equal another one (the width, say) is no less free
                mark_dynamic(x, [0, 1])
                mark_dynamic(rope, [1])
            # The graph splitter for DDP takes no activation checkpoints.
            with compile_settings(recompile_limit=_MAX_GRAPHS, optimize_ddp=False):
                return compiled(block, recompute, x, rope, *(windows or (None,)), kept)

        return run

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles compile anew.
        return {**self.__dict__, "_compiled_blocks": {}, "_trained_shapes": set()}

    def _add_special_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        pos = self._absolute_positions(grid)
        special = [t for t in (self.reg_tokens, self.class_token) if t is not None]
        if pos is not None and not self.pos_special_tokens:
            x = x + pos
        if special:
            x = torch.cat([t.expand(x.shape[0], -1, -1).to(x.dtype) for t in special] + [x], dim=1)
        return x + pos if pos is not None and self.pos_special_tokens else x

    def _absolute_positions(self, grid: tuple[int, int]) -> Tensor | None:
        if self.pos_embedding is None:
            return None
        antialias, special = self.pos_embed_antialias, self.pos_special_tokens
        window = (self.window_size, self.window_size) if self.window_size else self.pos_grid
        tile = window if self.tile_pos_embed else None
        return interpolate_position_table(
            self.pos_embedding, self.pos_grid, grid, special, antialias=antialias, tile=tile
        )

    def _window(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """The window (h, w) on this grid; None where it covers the grid, or no block has one."""
        if self.window_size == 0 or len(self.global_blocks) == len(self.encoder.block):
            return None
        # Not min(), which would put the size of a window into a graph as a function of the grid.
        height, width = (side if side < self.window_size else self.window_size for side in grid)
        window = (height, width)
        return None if window == grid else window

    def _effective_pt_grid_size(self) -> tuple[int, int] | None:
        if self.pt_grid_size == "count":
            return None
        return self.default_pt_grid_size if self.pt_grid_size is None else self.pt_grid_size

    @staticmethod
    def _attention_dtype(x: Tensor) -> torch.dtype:
        """The dtype that queries and keys of these tokens will have."""
        # There is no autocast on the meta device, and asking for it raises.
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def adapt(self, rank: int, alpha: float, dropout: float) -> None:
        """Adds LoRA (arXiv 2106.09685) to the products of all blocks; the rest does not learn.

        Attention's and feed-forward layers' own weights keep their names, and their values: the
        network computes what it did, until the adapters have learned.

        Args:
            rank: of the adapters; 0: there are none, and nothing changes.
            alpha, dropout: see :func:`~rope_vit_det.layers.lora.add_adapter`.
        """
        check_rule("lora_rank", rank, whole(0))
        check_rule("lora_alpha", alpha, number(0, or_least=False))
        check_rule("lora_dropout", dropout, number(0, 1, or_most=False))
        if rank == 0:
            return
        self.requires_grad_(False)
        for block in self.encoder.block:
            for layer in [each for each in block.modules() if isinstance(each, nn.Linear)]:
                add_adapter(layer, rank, alpha, dropout)

    def freeze(self, num_blocks: int) -> None:
        """Stops training of stem, special tokens, position table and the first blocks.

        Frozen blocks have no drop path: what does not learn should not be noisy.

        Args:
            num_blocks: 1 to the depth; 0: nothing is frozen; -1: all of the network.
        """
        depth = len(self.encoder.block)
        is_number = is_whole_number(num_blocks, -1) and num_blocks <= depth
        allowed = f"0 (nothing is frozen), 1 to {depth} (stem and that many blocks) or -1 (all)"
        check_argument("freeze_blocks", num_blocks, is_number, allowed)
        if num_blocks == 0:
            return
        blocks = self.encoder.block if num_blocks == -1 else self.encoder.block[:num_blocks]
        for block in blocks:
            block.drop_path.p = 0.0
        tokens = (self.pos_embedding, self.class_token, self.reg_tokens)
        first = (*tokens, self.conv_proj, self.encoder.pre_block, *blocks)
        for part in (self,) if num_blocks == -1 else first:
            if part is not None:
                part.requires_grad_(False)


def _run_block(block: EncoderBlock, recompute: bool, *args: Any) -> Tensor:
    """A block, whose activations are kept for the backward pass or computed again there."""
    if not recompute:
        return block(*args)
    if torch.compiler.is_compiling():  # the graph has the kernels that it was made with
        return checkpoint(block, *args, use_reentrant=False)
    again = nullcontext if torch.backends.cuda.cudnn_sdp_enabled() else kernels_for_any_size
    return checkpoint(
        block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again())
    )


def _poolings(class_token: bool) -> Rule:
    """What an embedding may be pooled by."""
    return optional(one_of(["mean", *["class_token"] * class_token]), "the network's own")
