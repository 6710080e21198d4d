"""Parts of tiny pipelines with random weights, built from configs: nothing is downloaded."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

WORDS = 16
SIDE = 32
NARROW = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
NARROW |= {"cross_attention_dim": 32}
LANGUAGE = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE |= {"num_key_value_heads": 4, "head_dim": 8}
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


def clip(kind: str = "CLIPTextModel") -> tuple[Any, nn.Module]:
    """Return a tokenizer of letters and a text encoder of width 32."""
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {word: number for number, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=WORDS)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=WORDS,
        projection_dim=32,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    return tokenizer, getattr(transformers, kind)(config).eval()


def gemma() -> tuple[Any, nn.Module]:
    """Return a tokenizer of letters and a language model of width 32."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters]
    tokenizer = transformers.GemmaTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    config = transformers.Gemma2Config(vocab_size=len(letters), **LANGUAGE)
    return tokenizer, transformers.Gemma2Model(config).eval()


def t5() -> tuple[Any, nn.Module]:
    """Return a tokenizer of letters and an encoder of width 64."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=64, d_kv=8, d_ff=37, num_heads=4, num_layers=2, decoder_start_token_id=0
    )
    return tokenizer, transformers.T5EncoderModel(config).eval()


def qwen(kind: str = "Qwen3Model") -> tuple[Any, nn.Module]:
    """Return a tokenizer of letters with a chat template, and a language model of width 32."""
    letters = ["<|endoftext|>", *string.ascii_letters, "Ġ", "Ċ"]
    tokenizer = transformers.Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = transformers.Qwen3Config(vocab_size=len(letters), **LANGUAGE)
    return tokenizer, getattr(transformers, kind)(config).eval()


def autoencoder(blocks: int = 2, kind: str = "AutoencoderKL", **config: Any) -> Any:
    """Return a VAE of 2 ** (blocks - 1) pixels a latent with random weights, those of its norms and biases too."""
    types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    vae = getattr(diffusers, kind)(block_out_channels=(16, 32, 32)[:blocks], norm_num_groups=4, **types, **config)
    with_random_vectors(vae)
    return vae.eval()


def with_random_vectors(vae: nn.Module) -> None:
    """Draw random biases and weights of norms, which are zeros and ones in a new model."""
    for weight in vae.parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, mean=1.0 if weight.mean() > 0.9 else 0.0, std=0.2)


def two_sided_autoencoder() -> diffusers.AsymmetricAutoencoderKL:
    """Return a VAE whose decoder also takes the image and the mask."""
    vae = diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(16, 32),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 32),
        norm_num_groups=4,
    )
    with_random_vectors(vae)
    return vae.eval()


def sixteen_latents(**config: Any) -> diffusers.AutoencoderKL:
    """Return a VAE as SD3's and FLUX's: 16 latents, a shift, and no 1x1 convolutions."""
    return autoencoder(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **config)


def unet(in_channels: int = 4, **config: Any) -> diffusers.UNet2DConditionModel:
    """Return a UNet of two blocks, from ``in_channels`` to four."""
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": UP_BLOCKS, **NARROW}
    return diffusers.UNet2DConditionModel(in_channels=in_channels, sample_size=SIDE // 2, **(blocks | config)).eval()


def ddim() -> diffusers.DDIMScheduler:
    """Return the scheduler of Stable Diffusion, without noise of its own."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def picture(side: int = SIDE) -> Tensor:
    """Return an image [1, 3, side, side] in [0, 1], of waves."""
    across, down = torch.meshgrid(*[torch.linspace(0, 3, side)] * 2, indexing="xy")
    waves = [torch.sin(across * (colour + 1) + down * 2) for colour in range(3)]
    return torch.stack(waves)[None] / 2 + 0.5


def mask() -> Tensor:
    """Return a mask of the left half, [1, 1, SIDE, SIDE]."""
    return (torch.arange(SIDE) < SIDE // 2).float().expand(1, 1, SIDE, SIDE)


def as_pil(pixels: Tensor) -> Image.Image:
    """Return pixels [1, 3, H, W] in [0, 1] as a Pillow image."""
    return Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy())
