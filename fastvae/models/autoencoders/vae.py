"""Encoder, decoder and posterior of the autoencoder (diffusers.models.autoencoders.vae)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvae.latents.logvar_range import LOGVAR_RANGE
from fastvae.latents.sampling import sample_posterior
from fastvae.models.modeling_outputs import BaseOutput
from fastvae.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block


@dataclass
class DecoderOutput(BaseOutput):
    """Result of decode: ``sample``, [B, out_channels, H, W]."""

    sample: Tensor


class Encoder(nn.Module):
    """Pixels to features: [B, in_channels, H, W] -> [B, 2 out_channels, H / f, W / f].

    f is 2 to the number of blocks less one. Source: diffusers.models.autoencoders.vae.Encoder.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        *,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        self.layers_per_block = layers_per_block
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        channels = block_out_channels[0]
        for i, down_block_type in enumerate(down_block_types):
            block = get_down_block(
                down_block_type,
                in_channels=channels,
                out_channels=block_out_channels[i],
                num_layers=layers_per_block,
                add_downsample=i < len(block_out_channels) - 1,
                resnet_act_fn=act_fn,
                resnet_groups=norm_num_groups,
                attention_head_dim=block_out_channels[i],
            )
            self.down_blocks.append(block)
            channels = block_out_channels[i]

        self.mid_block = UNetMidBlock2D(
            in_channels=channels,
            resnet_act_fn=act_fn,
            resnet_groups=norm_num_groups,
            attention_head_dim=channels,
            add_attention=mid_block_add_attention,
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels, 2 * out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    _gradient_checkpointing_func: Callable[..., Tensor]

    def forward(self, sample: Tensor) -> Tensor:
        sample = self.conv_in(sample)
        for block in (*self.down_blocks, self.mid_block):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                sample = self._gradient_checkpointing_func(block, sample)
            else:
                sample = block(sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class Decoder(nn.Module):
    """Latents to pixels: [B, in_channels, h, w] -> [B, out_channels, f h, f w].

    f is 2 to the number of blocks less one. Source: diffusers.models.autoencoders.vae.Decoder.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        *,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        self.layers_per_block = layers_per_block
        channels = block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        # up_blocks before mid_block, as in diffusers: optimisers number parameters in this order.
        self.up_blocks = nn.ModuleList()
        self.mid_block = UNetMidBlock2D(
            in_channels=channels,
            resnet_act_fn=act_fn,
            resnet_groups=norm_num_groups,
            attention_head_dim=channels,
            add_attention=mid_block_add_attention,
        )

        for i, up_block_type in enumerate(up_block_types):
            block_channels = block_out_channels[-1 - i]
            block = get_up_block(
                up_block_type,
                in_channels=channels,
                out_channels=block_channels,
                num_layers=layers_per_block + 1,
                add_upsample=i < len(block_out_channels) - 1,
                resnet_act_fn=act_fn,
                resnet_groups=norm_num_groups,
                attention_head_dim=block_channels,
            )
            self.up_blocks.append(block)
            channels = block_channels

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    _gradient_checkpointing_func: Callable[..., Tensor]

    def forward(self, sample: Tensor) -> Tensor:
        sample = self.conv_in(sample)
        for block in (self.mid_block, *self.up_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                sample = self._gradient_checkpointing_func(block, sample)
            else:
                sample = block(sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class DiagonalGaussianDistribution:
    """Posterior over latents: a mean and a log-variance per element.

    ``parameters``, [B, 2L, h, w], are mean and log-variance. Only they are kept; everything else is computed on access,
    in their dtype. The log-variance is clamped to [-30, 20]. With ``deterministic=True`` the deviation is zero.
    Source: diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        if parameters.ndim != 4 or parameters.shape[1] % 2:
            raise ValueError(
                f"parameters must hold mean and log-variance, [B, 2L, h, w], got shape {tuple(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = deterministic

    @property
    def mean(self) -> Tensor:
        """Mean, [B, L, h, w]: a contiguous copy, so that torch.save writes it without the log-variance."""
        return self.parameters.chunk(2, dim=1)[0].clone(memory_format=torch.contiguous_format)

    @property
    def logvar(self) -> Tensor:
        """Log-variance, [B, L, h, w], within [-30, 20]."""
        return self.parameters.chunk(2, dim=1)[1].clamp(*LOGVAR_RANGE).contiguous()

    @property
    def std(self) -> Tensor:
        """Standard deviation, [B, L, h, w]; zero if the distribution is deterministic."""
        return self._spread(0.5)

    @property
    def var(self) -> Tensor:
        """Variance, [B, L, h, w]; infinite in fp16 for a log-variance above 11.09."""
        return self._spread(1.0)

    def _spread(self, power: float) -> Tensor:
        logvar = self.logvar
        return torch.zeros_like(logvar) if self.deterministic else torch.exp(power * logvar)

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Return mean + std * noise, [B, L, h, w], differentiable.

        ``generator``: one, or one for each row; the noise is that of diffusers, bit for bit. ``seeds``: one unsigned
        64-bit integer for each row instead; the noise of row i depends on seeds[i] alone. Raises ValueError for a
        number of generators or seeds other than B, for both at once, and for a CUDA generator on CPU parameters.
        """
        drawn = sample_posterior(self.parameters, seeds=seeds, generator=generator)
        # Drawn even if it is not used: the generator has then the state that diffusers leaves.
        return self.mean if self.deterministic else drawn

    def mode(self) -> Tensor:
        """Return the most likely latents, [B, L, h, w]: the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return the Kullback-Leibler divergence from the standard normal, or from ``other``: [B], in nats.

        Summed in fp32 for half-precision parameters, since variances and sums overflow fp16; zero for a deterministic
        distribution.
        """
        mean, logvar = self._wide()
        if self.deterministic:
            return mean.new_zeros(mean.shape[0])
        var = torch.exp(logvar)
        if other is None:
            terms = mean.pow(2) + var - 1.0 - logvar
        else:
            other_mean, other_logvar = other._wide()
            other_var = torch.exp(other_logvar)
            terms = (mean - other_mean).pow(2) / other_var + var / other_var - 1.0 - logvar + other_logvar
        return 0.5 * torch.sum(terms, dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return the negative log-likelihood of ``sample``, [B, L, h, w], summed over ``dims``, in nats, as kl is."""
        mean, logvar = self._wide()
        if self.deterministic:
            return mean.new_zeros(mean.shape[0])
        terms = math.log(2.0 * math.pi) + logvar + (sample.to(mean.dtype) - mean).pow(2) / torch.exp(logvar)
        return 0.5 * torch.sum(terms, dim=tuple(dims))

    def _wide(self) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if self.parameters.dtype == torch.float64 else torch.float32
        # Views of the moments, as in diffusers: torch sums other strides in another order.
        mean, logvar = self.parameters.chunk(2, dim=1)
        return mean.to(wide), logvar.clamp(*LOGVAR_RANGE).to(wide)


class AutoencoderMixin:
    """Switches of slicing and tiling (diffusers: AutoencoderMixin)."""

    use_slicing: bool = False
    use_tiling: bool = False
    tile_slivers: bool = True

    def enable_slicing(self) -> None:
        """Encode and decode the images of a batch one by one, for less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False

    def enable_tiling(self, *, exact: bool = False, max_memory: int | str = "auto", slivers: bool = True) -> None:
        """Encode and decode large images in pieces: in overlapping, blended tiles, as diffusers does, or exactly.

        exact: encode and decode in bands of rows, with the bits of the whole image. For a model that fastvae.accelerate
        has put on the fast path, on a CPU (docs/memory.md). max_memory: bytes that a call may take beside its input:
        a number, a text such as "12GiB", or "auto" for four fifths of what is free at the call.
        slivers: diffusers starts a tile at every stride, so the last one can be a few pixels wide; False leaves out
        tiles that are wholly inside the one before.
        Raises ValueError for exact=True on a model that is not accelerated, and for another max_memory.
        """
        if exact:
            raise ValueError(f"exact=True must come after fastvae.accelerate, which this {type(self).__name__} lacks")
        if max_memory != "auto":
            raise ValueError(f"max_memory must come with exact=True, got {max_memory!r} without it")
        self.use_tiling = True
        self.tile_slivers = slivers

    def disable_tiling(self) -> None:
        """Encode and decode each image whole."""
        self.use_tiling = False
