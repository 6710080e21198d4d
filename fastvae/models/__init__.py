"""The network, under diffusers' class and file names.

autoencoders         the models, encoder, decoder and posterior
unets                the blocks of encoder and decoder
resnet               the residual block
attention_processor  self-attention over pixels, and its processors
downsampling         the stride-2 convolution between encoder blocks
upsampling           the doubling between decoder blocks
activations          activation functions by name
modeling_outputs     results, by attribute, key and position
configuration_utils  config of a model: registered, read as attributes, saved
modeling_utils       loading, saving, dtype, device, size and checkpointing of every model
in_pipelines         behaviour of a model as the `vae` of a diffusers pipeline
"""

from fastvae.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from fastvae.models.autoencoders.autoencoder_kl import AutoencoderKL
from fastvae.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from fastvae.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from fastvae.models.downsampling import Downsample2D
from fastvae.models.modeling_outputs import AutoencoderKLOutput
from fastvae.models.resnet import ResnetBlock2D
from fastvae.models.unets.unet_2d_blocks import (
    AttnDownEncoderBlock2D,
    AttnUpDecoderBlock2D,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from fastvae.models.upsampling import Upsample2D

__all__ = [
    "Attention",
    "AttnDownEncoderBlock2D",
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnUpDecoderBlock2D",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLOutput",
    "Decoder",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "DownEncoderBlock2D",
    "Downsample2D",
    "Encoder",
    "FusedAttnProcessor2_0",
    "ResnetBlock2D",
    "UNetMidBlock2D",
    "UpDecoderBlock2D",
    "Upsample2D",
]
