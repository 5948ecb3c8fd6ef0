"""The parts of the shapes model: small instances of the classes that a `WanPipeline` is made of."""

from __future__ import annotations

import dataclasses

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ..captions import VOCABULARY

FLOW_SHIFT = 10.0
"""Shift of the sampler's sigmas toward high noise. Few, strong latents stand for an object: at 3, as Wan takes at
480p, the first two or three of 50 steps would decide where it is."""
LATENT_CHANNELS = 32
DECODER_WIDTHS = (24, 48)
"""Of the decoder that the encoder is trained with, and of the one that then takes its place: the first cannot draw the
corners of small striped objects, whatever the latents say."""
TEXT_DIM = 128
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Size of a transformer; the defaults are those of the bundled one."""

    layers: int = 6
    heads: int = 3
    """Heads of 64 channels."""
    ffn_dim: int = 576
    """Width of the feed-forward layers."""

    @classmethod
    def parse(cls, text: str) -> TransformerSize:
        """Read a size such as 8x5x960: layers, heads and width of the feed-forward layers.

        Raises:
            ValueError: If it is none.
        """
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"`size` must be layers x heads x FFN width, such as 8x5x960, got {text!r}.")
        layers, heads, ffn_dim = map(int, parts)
        return cls(layers=layers, heads=heads, ffn_dim=ffn_dim)

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads} heads of {HEAD_DIM}, FFN {self.ffn_dim}"


HEAD_DIM = 64
LARGER_SIZE = TransformerSize(layers=8, heads=4, ffn_dim=768)
"""Meant to take less than twice as long as the bundled one by default; `scripts/time_shapes.py` times them."""


def build_vae(decoder_width: int = DECODER_WIDTHS[0]) -> AutoencoderKLWan:
    """A Wan VAE that takes 4 frames x 8 x 8 pixels to one latent of 32 channels (the first frame alone)."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=decoder_width,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def build_transformer(size: TransformerSize | None = None) -> WanTransformer3DModel:
    """A Wan transformer with a token a latent: 96x96 pixels and 33 frames make 9 x 12 x 12 tokens."""
    size = size or TransformerSize()
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=size.heads,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A UMT5 encoder of two layers over the grammar's words."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=64,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar, lower-cased; punctuation is dropped and other words are unknown."""
    words = [PAD, END, UNKNOWN, *VOCABULARY]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def build_pipeline(
    vae: AutoencoderKLWan, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel
) -> WanPipeline:
    """An ordinary `WanPipeline` of these parts, with a first-order flow-matching sampler."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=transformer,
    )
