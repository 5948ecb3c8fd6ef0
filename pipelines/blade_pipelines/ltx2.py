"""Adapter for Diffusers' LTX-2 transformers (2, 2.3 and 2.5): video and audio in one model, sparse in the video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_ltx2
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2Attention,
    LTX2AudioVideoAttnProcessor,
    LTX2VideoTransformer3DModel,
)

from blade.families.protocol import Condition, Inputs, Permutation
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import CutKeyAttention, SequenceSplit, SplitModule
from blade.token_grid import TokenGrid
from blade_pipelines.shared.coordinates import grid_of_coordinates
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.processor import SparseProcessor

# Diffusers' first releases with LTX-2 lack what 2.3 brought
PerturbedProcessor = getattr(transformer_ltx2, "LTX2PerturbedAttnProcessor", LTX2AudioVideoAttnProcessor)

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions, (B, tokens, H * D) each, or (B, H, tokens, D / 2) if halves are rotated."""

TEXT_TOKENS = 1024
"""Text tokens that the pipelines pad to."""
FRAME_RATE = 24
"""Frames a second that the pipelines take by default."""
AUDIO_RATE = 25
"""Audio tokens a second: 16,000 samples in hops of 160, of which the audio VAE makes one of four."""
UNGUIDED: dict[str, float] = {
    "audio_guidance_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
}
"""Arguments of the pipelines' call that switch off all guidance beside `guidance_scale`."""

ORIGINAL_NAMES = (
    (r"^(audio_|)proj_in$", r"\1patchify_proj"),
    (r"^(audio_|)time_embed\.", r"\1adaln_single."),
    (r"^(audio_|)prompt_adaln\.", r"\1prompt_adaln_single."),
    (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
    (r"^av_cross_attn_video_a2v_gate\.", "av_ca_a2v_gate_adaln_single."),
    (r"^av_cross_attn_audio_v2a_gate\.", "av_ca_v2a_gate_adaln_single."),
    (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
    (r"\.norm_(q|k)$", r".\1_norm"),
)
"""Names in LTX-2's own code. Source: `scripts/convert_ltx2_to_diffusers.py` of Diffusers."""


class LTX2SparseProcessor(SparseProcessor):
    """Video self-attention of an LTX-2 block with BLADE, with its gates and perturbations."""

    def __call__(
        self,
        attn: LTX2Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Tables | None = None,
        key_rotary_emb: Tables | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: torch.Tensor | bool | None = None,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processors."""
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool((perturbation_mask == 0).all())
        if not self.layer.attends or all_perturbed:
            if not all_perturbed:  # where all is perturbed, nothing attends
                self.layer.count_dense()
            perturbation: dict[str, Any] = {}
            if perturbation_mask is not None:  # of processors that take none, no block asks for it
                perturbation = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
            dense: torch.Tensor = self.previous(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                **perturbation,
            )
            return dense
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("A sparse LTX-2 layer takes neither `encoder_hidden_states` nor an `attention_mask`.")

        query, key, value = _project(attn, hidden_states, hidden_states, query_rotary_emb, key_rotary_emb)
        output = self.layer.attend(query, key, value).type_as(query)
        if perturbation_mask is not None:  # 0 lets the values pass, 1 what was attended to
            output = torch.lerp(value, output, perturbation_mask.unsqueeze(-1).to(output.dtype))
        return _project_out(attn, hidden_states, output)


class LTX2CutKeyProcessor:
    """Attention of sound to video whose tokens are cut, where several ranks compute one video."""

    def __init__(self, attend: CutKeyAttention, previous: Any) -> None:
        """Create a processor.

        Args:
            attend: attention to keys and values that are cut.
            previous: the processor to replace, whose attention backend is used.
        """
        self.attend = attend
        self.previous = previous

    def __call__(
        self,
        attn: LTX2Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Tables | None = None,
        key_rotary_emb: Tables | None = None,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processors."""
        if attention_mask is not None:
            raise ValueError("Sound attends to the video of several GPUs without an `attention_mask`.")
        query, key, value = _project(attn, hidden_states, encoder_hidden_states, query_rotary_emb, key_rotary_emb)
        attend = partial(dispatch_attention_fn, backend=self.previous._attention_backend)
        return _project_out(attn, hidden_states, self.attend(query, key, value, attend).type_as(query))


def _project(
    attn: LTX2Attention,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    query_tables: Tables | None,
    key_tables: Tables | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute queries, and keys and values, (B, S, H, D), and rotate them."""
    query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(encoder_hidden_states))
    value = attn.to_v(encoder_hidden_states)
    if query_tables is not None:  # frequencies differ between heads, so `norm_and_rope` does not apply
        rotate = getattr(transformer_ltx2, f"apply_{attn.rope_type}_rotary_emb")
        query = rotate(query, query_tables)
        key = rotate(key, query_tables if key_tables is None else key_tables)
    query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
    return query, key, value


def _project_out(attn: LTX2Attention, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Apply the gates, of the module's input, and the output projection to what was attended to, (B, S, H, D)."""
    gate = getattr(attn, "to_gate_logits", None)
    if gate is not None:
        output = output * (2 * gate(hidden_states).sigmoid()).unsqueeze(-1)
    projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output.flatten(2, 3)))
    return projected


class LTX2Family(DiffusersFamily):
    """Adapter for `LTX2VideoTransformer3DModel`: all pipelines, with keyframes and reference videos in the sequence.

    The tokens of the video that is made form the grid. Condition tokens beside it are kept exactly, as text is
    elsewhere. Audio is not permuted.
    """

    name = "LTX-2 (LTX2VideoTransformer3DModel)"
    guidance_takes_two_passes = True
    guidance_passes = 4  # also with self-attention perturbed, and with both modalities apart
    guidance_batch = 2  # the other two by themselves
    whole_sequence = True
    transformers = (LTX2VideoTransformer3DModel,)
    processors = (LTX2AudioVideoAttnProcessor, PerturbedProcessor)
    sparse_processor = LTX2SparseProcessor
    attention_name = "attn1"
    time_embedding_name = "time_embed.emb.timestep_embedder"
    original_names = ORIGINAL_NAMES
    condition_pipelines: ClassVar[Mapping[tuple[str, Condition], str]] = {
        ("LTX2Pipeline", "image"): "LTX2ImageToVideoPipeline"
    }

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "ltx-2"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return LTX-2's values, or those of its distilled releases: eight steps without guidance.

        Source: the documentation of LTX-2 in Diffusers, and `diffusers.pipelines.ltx2.utils`.
        """
        from diffusers.pipelines.ltx2 import utils

        if _is_distilled(pipe):
            steps, guidance, negative = len(utils.DISTILLED_SIGMA_VALUES), 1.0, None
        else:
            steps, guidance, negative = 30, 3.0, utils.DEFAULT_NEGATIVE_PROMPT
        return SamplingDefaults(
            frames=121, fps=FRAME_RATE, steps=steps, guidance_scale=guidance, negative_prompt=negative
        )

    def call_options(self, pipe: Any, request: Any) -> Mapping[str, Any]:
        """Return the noise levels of distilled releases and, without guidance, what switches off its other kinds.

        Raises:
            ValueError: if a distilled release is asked for another number of steps than it has noise levels.
        """
        from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

        options: dict[str, Any] = {} if request.guidance_scale > 1 else dict(UNGUIDED)
        if _is_distilled(pipe):
            if request.steps == len(DISTILLED_SIGMA_VALUES):
                options["sigmas"] = list(DISTILLED_SIGMA_VALUES)
            elif "use_dynamic_shifting" in pipe.scheduler.config:  # else a student samples at its own
                raise ValueError(
                    f"`steps` must be {len(DISTILLED_SIGMA_VALUES)} for a distilled LTX-2 model, whose noise levels "
                    f"are given, got {request.steps}."
                )
        return options

    def sound_rate(self, pipe: Any) -> int | None:
        """Return the vocoder's samples a second."""
        vocoder = getattr(pipe, "vocoder", None)
        return None if vocoder is None else int(vocoder.config.output_sampling_rate)

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid given by `num_frames`, `height` and `width`, with which sequences begin, or by coordinates.

        Diffusers' pipelines append condition tokens; those that give no size give coordinates.
        """
        config, tokens = transformer.config, inputs["hidden_states"].shape[1]
        patches = (config.patch_size_t, config.patch_size, config.patch_size)
        sizes: list[Any] = [inputs.get(name) for name in ("num_frames", "height", "width")]
        if all(sizes):
            frames, height, width = (-(-size // patch) for size, patch in zip(sizes, patches))
            if frames * height * width <= tokens:
                return TokenGrid(frames, height, width, text_after=tokens - frames * height * width)
        coordinates = inputs.get("video_coords")
        if coordinates is None or coordinates.shape[2] != tokens:
            raise ValueError(
                f"`num_frames`, `height` and `width`, or `video_coords`, must say how {tokens} tokens lie, got "
                f"{', '.join(map(str, sizes))} and {'none' if coordinates is None else tuple(coordinates.shape)}."
            )
        return grid_of_coordinates(coordinates)

    def pass_dense_reason(self, transformer: DiffusersModule, inputs: Inputs) -> str | None:
        """Return why no layer can be sparse: a mask of single pairs of tokens."""
        if inputs.get("video_self_attention_mask") is None:
            return None
        return "`video_self_attention_mask`, as of references of less than full strength, is of single pairs of tokens"

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros, with the sound track of a video at 24 frames a second."""
        config, like = transformer.config, transformer.proj_out.weight
        frames, height, width = latent_size
        text_tokens = text_tokens or TEXT_TOKENS
        time_scale, *_ = config.vae_scale_factors
        audio_tokens = max(round(((frames - 1) * time_scale + 1) / FRAME_RATE * AUDIO_RATE), 1)
        text, audio_text = (config.caption_channels,) * 2
        if not config.get("use_prompt_embeddings", True):
            text, audio_text = config.cross_attention_dim, config.audio_cross_attention_dim
        return {
            "hidden_states": like.new_zeros(batch, frames * height * width, config.in_channels),
            "audio_hidden_states": like.new_zeros(batch, audio_tokens, config.audio_in_channels),
            "encoder_hidden_states": like.new_zeros(batch, text_tokens, text),
            "audio_encoder_hidden_states": like.new_zeros(batch, text_tokens, audio_text),
            "timestep": like.new_zeros(batch),
            "sigma": like.new_zeros(batch),
            "encoder_attention_mask": like.new_ones(batch, text_tokens),
            "audio_encoder_attention_mask": like.new_ones(batch, text_tokens),
            "num_frames": frames,
            "height": height,
            "width": width,
            "fps": float(FRAME_RATE),
            "audio_num_frames": audio_tokens,
            "use_cross_timestep": True,
        }

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the video tokens, and their coordinates, timesteps and marks.

        A `perturbation_mask` is of batch items, for the sound too.

        Both tables of positions, of self-attention and of attention to the audio, are made from the coordinates.
        """
        tokens = inputs["hidden_states"]
        coordinates = inputs.get("video_coords")
        if coordinates is None:
            sizes = [inputs[name] for name in ("num_frames", "height", "width")]
            coordinates = transformer.rope.prepare_video_coords(
                len(tokens), *sizes, tokens.device, fps=inputs.get("fps", float(FRAME_RATE))
            )
        permuted = {
            **inputs,
            "hidden_states": tokens.index_select(1, permutation),
            "video_coords": coordinates.index_select(2, permutation.to(coordinates.device)),
        }
        for name in ("timestep", "video_keyframes_mask"):
            value = inputs.get(name)
            if value is not None and value.ndim > 1 and value.shape[1] == len(permutation):
                permuted[name] = value.index_select(1, permutation)
        return permuted

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Put the predicted video tokens back into raster order; the audio is as it was."""
        if isinstance(output, tuple):
            return (output[0].index_select(1, inverse), *output[1:])
        return type(output)(sample=output.sample.index_select(1, inverse), audio_sample=output.audio_sample)

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit | None:
        """Return where the video is cut; text and sound are whole on every rank.

        Diffusers' own plan cuts the text instead of the positions that sound attends to, and no timesteps.
        """
        tokens = 2 if transformer.config.rope_type == "split" else 1
        return SequenceSplit(
            modules=(
                SplitModule(name="", inputs={"hidden_states": 1, "timestep": 1, "video_keyframes_mask": 1}),
                SplitModule(name="rope", cut_output=tokens),
                SplitModule(name="cross_attn_rope", cut_output=tokens),
                SplitModule(name="proj_out", gathered_output=1),
            ),
            cut_keys={"transformer_blocks.*.video_to_audio_attn": LTX2CutKeyProcessor},
        )

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Hook nothing: positions are made from the coordinates, which `permute_inputs` permutes."""
        return ()


def _is_distilled(pipe: Any) -> bool:
    """Return whether a pipeline's scheduler takes noise levels as they are, as those of distilled releases do."""
    config = pipe.scheduler.config
    return not config.get("use_dynamic_shifting") and config.get("shift_terminal") is None


FAMILIES = (LTX2Family(),)
"""Families of this module, for the registry."""
