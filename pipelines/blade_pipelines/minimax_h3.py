"""Adapter for Diffusers' MiniMax-H3 transformers: one packed sequence of text, conditions, sound and video."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_minimax_h3 import (
    MiniMaxH3Attention,
    MiniMaxH3AttnProcessor,
    MiniMaxH3Transformer3DModel,
    _apply_rotary_emb,
)
from torch.utils.weak import WeakIdKeyDictionary

from blade.families.protocol import Inputs, Permutation, RowOrder
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit, SplitModule
from blade.families.video_lengths import VideoLengths
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.processor import SparseProcessor

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions of all rows, (rows, channels that are rotated) each."""

TEXT, AUDIO = 1, 2
"""Tags of rows of text and of sound; those of video have 0. Source: Diffusers' class."""
TEXT_TOKENS = 256
"""Assumed length of a text where none is told: the pipeline pads none, and the authors recommend long prompts."""
FPS, AUDIO_RATE, AUDIO_CHANNELS = 24, 40, 2
"""Frames a second, latents of sound a second, and channels of sound. Source: Diffusers' pipeline."""
LATENTS_PER_CHUNK, FRAMES_PER_CHUNK = 5, 17
"""Latent frames, and frames, of a chunk of the video VAE. Source: Diffusers' pipeline."""
FIRST_FRAMES, LAST_FRAMES = 124, 345
"""Fewest and most frames of the form 17n + 5 in 5 to 15 seconds. Source: Diffusers' pipeline."""

ORIGINAL_NAMES = (
    (r"^transformer_blocks\.", "blocks."),
    (r"^token_refiner\.refiner_blocks\.", "token_refiner.blocks."),
    (r"^time_embedder\.linear_1$", "time_embedder.proj_in"),
    (r"^time_embedder\.linear_2$", "time_embedder.proj_out"),
    (r"^proj_in$", "video_patch_proj"),
    (r"^audio_proj_in$", "audio_patch_proj"),
    (r"^context_embedder$", "condition_proj"),
    (r"^norm_out\.norm$", "final_layer.norm"),
    (r"^norm_out\.linear$", "final_layer.adaln_proj.linear"),
    (r"^proj_out$", "final_layer.video_out"),
    (r"^audio_proj_out$", "final_layer.audio_out"),
    (r"\.attn\.to_q$", ".attn.qkv_proj"),
    (r"\.attn\.to_k$", ".attn.qkv_proj"),
    (r"\.attn\.to_v$", ".attn.qkv_proj"),
    (r"\.attn\.norm_(q|k)$", r".attn.\1_norm"),
    (r"\.attn\.to_out\.0$", ".attn.out_proj"),
    (r"\.ff\.net\.0\.proj$", ".mlp.fc1"),
    (r"\.ff\.net\.2$", ".mlp.fc2"),
)
"""Names in MiniMax-H3's own code, with its rows of queries, keys and values in that order. Source:
`scripts/convert_minimax_h3_to_diffusers.py` of Diffusers."""

ROW_ORDERS: tuple[tuple[str, RowOrder], ...] = (
    (r"\.mlp\.fc1$", "swapped-halves"),
    (r"\.attn\.qkv_proj$", "by-head"),
)
"""Gate and value of its MLPs are the other way round; DiffSynth keeps queries, keys and values head by head. Source:
`_convert_non_diffusers_minimax_h3_lora_to_diffusers` of Diffusers."""


class MiniMaxH3SparseProcessor(SparseProcessor):
    """Self-attention of a MiniMax-H3 block with BLADE: video that is made first, all other rows behind it."""

    def __call__(
        self,
        attn: MiniMaxH3Attention,
        hidden_states: torch.Tensor,
        rotary_emb: Tables | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processor."""
        if not self.layer.attends:
            self.layer.count_dense()
            dense: torch.Tensor = self.previous(attn, hidden_states, rotary_emb, attention_mask)
            return dense
        if attention_mask is not None:
            raise ValueError("A sparse MiniMax-H3 layer takes no `attention_mask`.")

        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:  # of the first channels alone, in halves, so that `norm_and_rope` does not apply
            query, key = _apply_rotary_emb(query, *rotary_emb), _apply_rotary_emb(key, *rotary_emb)
        output = self.layer.attend(query, key, value).flatten(2, 3).type_as(query)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected


@dataclass(frozen=True)
class _Layout:
    """A grid that was read from rows, and where they said it."""

    video_indices: Callable[[], torch.Tensor | None]
    """Weak reference to the places of the video's rows."""
    grid: TokenGrid
    """The grid."""


class MiniMaxH3Family(DiffusersFamily):
    """Adapter for `MiniMaxH3Transformer3DModel`: text, first and last frame, and references to video with sound.

    The transformer is told where each row stands in the packed sequence, so that another order of the rows is another
    set of places: the latents themselves, and the output, stay as they are. The video that is made comes first, in
    token order; text, conditions and sound come behind it in their own order, kept as keys and dense as queries.
    """

    name = "MiniMax-H3 (MiniMaxH3Transformer3DModel)"
    guidance_takes_two_passes = False
    timesteps_rise = True
    size_multiple = 32
    transformers = (MiniMaxH3Transformer3DModel,)
    processors = (MiniMaxH3AttnProcessor,)
    sparse_processor = MiniMaxH3SparseProcessor
    attention_name = "attn"
    time_embedding_name = "time_embedder"
    original_names = ORIGINAL_NAMES
    row_orders = ROW_ORDERS

    def __init__(self) -> None:
        self._layouts: Any = WeakIdKeyDictionary()

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "minimax-h3"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return MiniMax-H3's own size and length; its weights are distilled for guidance.

        Source: the documentation of Diffusers' `MiniMaxH3ModularPipeline`: 124 frames of 768 x 1344 at 24 a second.
        The number of steps is the pipeline's own default.
        """
        return SamplingDefaults(height=768, width=1344, frames=FIRST_FRAMES, fps=FPS, steps=50, guidance_scale=1.0)

    def video_lengths(self, pipe: Any) -> VideoLengths:
        """Return the lengths of the form 17n + 5, of 5 to 15 seconds, that the pipeline makes."""
        chunks = FIRST_FRAMES // FRAMES_PER_CHUNK
        return VideoLengths(
            first=FIRST_FRAMES,
            step=FRAMES_PER_CHUNK,
            last=LAST_FRAMES,
            first_latents=LATENTS_PER_CHUNK * chunks + 2,
            latents_per_step=LATENTS_PER_CHUNK,
            rule="17n + 5, of 5 to 15 seconds",
        )

    def sound_rate(self, pipe: Any) -> int | None:
        """Return the samples a second of the sound VAE."""
        rate: int = pipe.audio_sampling_rate
        return rate

    def evaluations(self, steps: int) -> int:
        """Return one less than the steps, which count the schedule's last point, where nothing is computed."""
        return steps - 1

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of the video that is made, followed by all other rows.

        Raises:
            ValueError: its rows lie on no grid.
        """
        positions, video_indices = inputs["position_ids"], inputs["video_indices"]
        known = self._layouts.get(positions)
        if known is not None and known.video_indices() is video_indices:
            grid: TokenGrid = known.grid
            return grid
        if positions.ndim != 2 or positions.shape[1] != 3:
            raise ValueError(f"`position_ids` must be (rows, 3), got shape {tuple(positions.shape)}.")
        frames, height, width = _video_grid(positions, video_indices, inputs["timestep_indices"])
        text = len(positions) - frames * height * width
        grid = TokenGrid(frames, height, width, text_after=text, dense_text=True)
        self._remember(inputs, grid)
        return grid

    def _remember(self, inputs: Inputs, grid: TokenGrid) -> None:
        """Keep a grid for as long as the positions last, which are a run's, and cannot always be read."""
        self._layouts[inputs["position_ids"]] = _Layout(weakref.ref(inputs["video_indices"]), grid)

    def video_timestep(self, inputs: Inputs) -> torch.Tensor:
        """Return the timestep of the video that is made, (1,): that of its last row, the last of all video rows."""
        row = inputs["video_indices"][-1:]
        timestep: torch.Tensor = inputs["timestep"].index_select(0, inputs["timestep_indices"].index_select(0, row))
        return timestep

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros for a text without conditions, with the sound of a video of this length."""
        config, like = transformer.config, transformer.proj_out.weight
        frames, height, width = (size // edge for size, edge in zip(latent_size, config.patch_size))
        text, video, audio = text_tokens or TEXT_TOKENS, frames * height * width, _audio_rows(latent_size[0])
        places = torch.arange(text + audio + video, device=like.device)
        axes = (torch.arange(size, device=like.device) for size in (frames, height, width))
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
        inputs: Inputs = {
            "hidden_states": like.new_zeros(batch, video, transformer.proj_in.in_features),
            "audio_hidden_states": like.new_zeros(batch, audio, config.audio_in_channels),
            "encoder_hidden_states": like.new_zeros(batch, text, config.text_dim),
            "timestep": like.new_zeros(2),
            "timestep_indices": torch.zeros_like(places),
            "token_tags": torch.zeros_like(places),
            "position_ids": torch.cat((cells.new_zeros(text + audio, 3), cells)),
            "text_indices": places[:text],
            "audio_indices": places[text : text + audio],
            "video_indices": places[text + audio :],
        }
        inputs["timestep_indices"][text : text + audio] = 1
        inputs["token_tags"][:text], inputs["token_tags"][text : text + audio] = TEXT, AUDIO
        self._remember(inputs, TokenGrid(frames, height, width, text_after=text + audio, dense_text=True))
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Give every row another place in the packed sequence, with its position, tag and timestep."""
        rows = _row_order(inputs["video_indices"], len(inputs["position_ids"]), permutation)
        places = rows.argsort()
        return {
            **inputs,
            **{
                name: inputs[name].index_select(0, rows) for name in ("position_ids", "token_tags", "timestep_indices")
            },
            **{
                name: places.index_select(0, inputs[name])
                for name in ("video_indices", "audio_indices", "text_indices")
            },
        }

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Return the output, which the transformer has in the latents' own order."""
        return output

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit | None:
        """Return the places of Diffusers' own plan: one packed sequence of all modalities."""
        return SequenceSplit(
            modules=(
                SplitModule(name="rope", cut_output=0),
                SplitModule(name="transformer_blocks.0", inputs={"hidden_states": 1}),
                SplitModule(name="transformer_blocks.*", inputs={"adaln_indices": 0}),
                SplitModule(name="norm_out", inputs={"timestep_indices": 0}),
                SplitModule(name="proj_out", gathered_output=1),
                SplitModule(name="audio_proj_out", gathered_output=1),
            )
        )

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Hook nothing: positions come as inputs."""
        return ()


def _row_order(video_indices: torch.Tensor, rows: int, permutation: torch.Tensor) -> torch.Tensor:
    """Return where each row of the new order comes from, (rows,) int64: video that is made, then all others."""
    made = video_indices[len(video_indices) - len(permutation) :]
    is_made = torch.zeros(rows, dtype=torch.int8, device=made.device).index_fill(0, made, 1)
    others = is_made.argsort(stable=True)[: rows - len(permutation)]
    return torch.cat((made.index_select(0, permutation), others))


def _audio_rows(latent_frames: int) -> int:
    """Return the rows of sound of a video of so many latent frames."""
    frames = (latent_frames - 2) // LATENTS_PER_CHUNK * FRAMES_PER_CHUNK + LATENTS_PER_CHUNK
    return AUDIO_CHANNELS * max(round(frames / FPS * AUDIO_RATE), 1)


def _video_grid(
    positions: torch.Tensor, video_indices: torch.Tensor, timestep_indices: torch.Tensor
) -> tuple[int, int, int]:
    """Read frames, height and width of the video that is made from its rows' coordinates (frame, row, column).

    The video that is made is the last run of video rows that stand side by side and have one timestep: conditions come
    before it, and have another one, or other rows in between.
    """
    indices = video_indices.cpu()
    times, places = timestep_indices.cpu()[indices], positions.cpu()[indices]
    joined = (indices.diff() == 1) & (times.diff() == 0)
    breaks = (~joined).nonzero()
    places = places[int(breaks[-1]) + 1 if len(breaks) else 0 :]
    frame = places[:, 1:]
    again = (frame[:-1] == frame[-1]).all(-1).nonzero()
    area = len(frame) - 1 - int(again[-1]) if len(again) else len(frame)
    frame = frame[-area:]
    width = int((frame[:, 0] == frame[0, 0]).sum())
    grid = (len(places) // area, area // width, width)
    if _lies_on(places, *grid):
        return grid
    raise ValueError(
        f"`position_ids` of the {len(places)} rows of the video that is made, the last of `video_indices`, must lie "
        f"on a grid of frames, rows and columns, in that order, got frames of {area} rows that make none."
    )


def _lies_on(places: torch.Tensor, frames: int, height: int, width: int) -> bool:
    """Return whether (rows, 3) coordinates are those of a grid in raster order, with rising frames."""
    if frames * height * width != len(places):
        return False
    cells = places.view(frames, height, width, 3)
    return bool(
        (cells[..., 0] == cells[:, :1, :1, 0]).all()
        and (cells[1:, 0, 0, 0] > cells[:-1, 0, 0, 0]).all()
        and (cells[..., 1] == cells[:1, :, :1, 1]).all()
        and (cells[..., 2] == cells[:1, :1, :, 2]).all()
    )


FAMILIES = (MiniMaxH3Family(),)
"""Families of this module, for the registry."""
