"""Self-attention over pixels, and its processors, which users can replace (diffusers.models.attention_processor)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionProcessor = Callable[..., Tensor]
_OTHER_ATTENTION = "fastvae.accelerate puts attention on fused kernels, and set_attn_processor on yours"


class Attention(nn.Module):
    """x + to_out(softmax(q kᵀ / sqrt(dim_head)) v), where q, k, v are projections of group_norm(x).

    Shapes: [B, query_dim, H, W] -> the same; the pixels are the tokens.
    Source: diffusers.models.attention_processor.Attention for self-attention, with residual_connection=True and
    rescale_output_factor=1.
    """

    fused_projections = False

    def __init__(
        self,
        query_dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        norm_num_groups: int,
        eps: float = 1e-5,
        processor: AttentionProcessor | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.inner_dim = dim_head * heads
        self.query_dim = query_dim

        self.group_norm = nn.GroupNorm(norm_num_groups, query_dim, eps=eps)
        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=bias)
        self.to_k = nn.Linear(query_dim, self.inner_dim, bias=bias)
        self.to_v = nn.Linear(query_dim, self.inner_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, query_dim), nn.Dropout(dropout)])
        self.set_processor(AttnProcessor2_0() if processor is None else processor)

    def set_processor(self, processor: AttentionProcessor) -> None:
        """Compute this layer by ``processor(attn, hidden_states)``. Raises ValueError for a processor of diffusers."""
        if type(processor).__module__.startswith("diffusers."):
            raise ValueError(
                f"processor must be one of fastvae.models', or yours, got diffusers' {type(processor).__name__}: it "
                "computes the layers of diffusers' AutoencoderKL alone, which fastvae.accelerate takes as well"
            )
        # torch registers a processor that is a module, and then refuses one that is none under its name.
        self._modules.pop("processor", None)
        self.processor = processor

    def get_processor(self) -> AttentionProcessor:
        """Return the processor that computes this layer."""
        return self.processor

    @torch.no_grad()
    def fuse_projections(self, fuse: bool = True) -> None:
        """Join to_q, to_k and to_v into one to_qkv; ``fuse=False`` removes it, and its keys of the state dict.

        The three keep their weights, as in diffusers, so that nothing is lost.
        """
        self.fused_projections = fuse
        if not fuse:
            self._modules.pop("to_qkv", None)
            return
        parts = (self.to_q, self.to_k, self.to_v)
        to_qkv = nn.Linear(
            self.query_dim,
            3 * self.inner_dim,
            bias=self.to_q.bias is not None,
            device=self.to_q.weight.device,
            dtype=self.to_q.weight.dtype,
        )
        to_qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        if to_qkv.bias is not None:
            to_qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        self.to_qkv = to_qkv

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)


class AttnProcessor2_0:
    """Attention by torch's scaled_dot_product_attention (diffusers: AttnProcessor2_0)."""

    def __call__(self, attn: Attention, hidden_states: Tensor) -> Tensor:
        return _attend(attn, hidden_states, lambda x: (attn.to_q(x), attn.to_k(x), attn.to_v(x)))


class AttnProcessor(AttnProcessor2_0):
    """AttnProcessor2_0, under the name that set_default_attn_processor sets in diffusers."""


class FusedAttnProcessor2_0:
    """Attention with the three projections as one product (diffusers: FusedAttnProcessor2_0)."""

    def __call__(self, attn: Attention, hidden_states: Tensor) -> Tensor:
        return _attend(attn, hidden_states, lambda x: attn.to_qkv(x).chunk(3, dim=-1))


def _attend(attn: Attention, hidden_states: Tensor, project: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    residual = hidden_states
    batch, channels, height, width = hidden_states.shape
    # group_norm takes [B, C, tokens], as in diffusers: the bits of its result depend on the shape.
    tokens = attn.group_norm(hidden_states.view(batch, channels, height * width)).transpose(1, 2)
    heads = (batch, height * width, attn.heads, attn.inner_dim // attn.heads)
    query, key, value = (part.view(heads).transpose(1, 2) for part in project(tokens))
    attended = F.scaled_dot_product_attention(query, key, value)
    attended = attended.transpose(1, 2).reshape(batch, height * width, attn.inner_dim)
    for layer in attn.to_out:
        attended = layer(attended)
    out = attended.transpose(1, 2).reshape(batch, channels, height, width)
    return out + residual


class AttentionMixin(nn.Module):
    """Processors of all attention layers of a model, read and set together (diffusers: AttentionMixin)."""

    original_attn_processors: dict[str, AttentionProcessor] | None = None

    def _attention_layers(self) -> dict[str, Attention]:
        return {f"{name}.processor": m for name, m in self.named_modules() if isinstance(m, Attention)}

    @property
    def attn_processors(self) -> dict[str, AttentionProcessor]:
        """Processor of each attention layer, by ``<module name>.processor``."""
        return {name: layer.get_processor() for name, layer in self._attention_layers().items()}

    def set_attn_processor(self, processor: AttentionProcessor | dict[str, AttentionProcessor]) -> None:
        """Set one processor for all layers, or a dict with one for each name in ``attn_processors``.

        Raises ValueError if the names of the dict are not those of the layers, and for a processor of diffusers.
        """
        layers = self._attention_layers()
        if isinstance(processor, dict):
            if set(processor) != set(layers):
                raise ValueError(
                    f"processor must name the {len(layers)} attention layers {sorted(layers)}, got {sorted(processor)}"
                )
            for name, layer in layers.items():
                layer.set_processor(processor[name])
        else:
            for layer in layers.values():
                layer.set_processor(processor)

    def set_default_attn_processor(self) -> None:
        """Set the built-in processor. Raises ValueError, as diffusers does, if another processor is not built in."""
        for name, processor in self.attn_processors.items():
            if not isinstance(processor, (AttnProcessor2_0, FusedAttnProcessor2_0)):
                raise ValueError(
                    f"set_default_attn_processor cannot replace {name}, a {type(processor).__name__}: "
                    "set a processor by set_attn_processor instead"
                )
        self.set_attn_processor(AttnProcessor())

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Take the call of trainers: attention is torch's, which needs no more memory than xformers', in both cases.

        Raises ValueError for an ``attention_op``.
        """
        if attention_op is not None:
            raise ValueError(f"attention_op must be left out, got {attention_op!r}: {_OTHER_ATTENTION}")

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Call set_use_memory_efficient_attention_xformers(True, attention_op)."""
        self.set_use_memory_efficient_attention_xformers(True, attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Call set_use_memory_efficient_attention_xformers(False)."""
        self.set_use_memory_efficient_attention_xformers(False)

    def set_attention_backend(self, backend: str) -> None:
        """Take "native", torch's scaled_dot_product_attention. Raises ValueError for another backend."""
        if backend != "native":
            raise ValueError(f"backend must be 'native', got {backend!r}: {_OTHER_ATTENTION}")

    def reset_attention_backend(self) -> None:
        """Return to "native", which is the only backend."""

    def fuse_qkv_projections(self) -> None:
        """Compute q, k and v by one product in every attention layer (diffusers: fuse_qkv_projections)."""
        if self.original_attn_processors is None:
            self.original_attn_processors = self.attn_processors
        for layer in self._attention_layers().values():
            layer.fuse_projections(fuse=True)
        self.set_attn_processor(FusedAttnProcessor2_0())

    def unfuse_qkv_projections(self) -> None:
        """Undo fuse_qkv_projections and remove its keys; without a fuse before, do nothing."""
        if self.original_attn_processors is None:
            return
        for layer in self._attention_layers().values():
            layer.fuse_projections(fuse=False)
        self.set_attn_processor(self.original_attn_processors)
        self.original_attn_processors = None
