"""Training videos that are drawn, encoded and kept on a device."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerFast

from ..batch_rendering import pack_scenes, render_batch, to_device
from .conditioned import CAPTION_TOKENS, tokenise
from .latents import draw_video, latent_statistics


class LatentPool:
    """The latest training videos; the oldest make room for new ones.

    Args:
        vae: Encodes the videos, on `device`; its config holds the latents' mean and standard deviation.
        tokenizer: Of the captions.
        capacity: How many videos there are at most.
        added_together: How many are drawn and encoded at once; `capacity` is a multiple of it.
        frames: Frames of a video.
        size: Edge of its canvas in pixels.
        two_objects: Fraction of captions with two objects.
        striped: Fraction of objects that are striped.
        seed: Seed of all videos; number i is drawn from (seed, i) alone.
        drawn: Number of videos that were drawn before, so that training that resumes sees new ones.
        device: Where they are rendered, encoded and kept.

    Raises:
        ValueError: If `capacity` is no multiple of `added_together`.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        tokenizer: PreTrainedTokenizerFast,
        *,
        capacity: int,
        added_together: int,
        frames: int,
        size: int,
        two_objects: float,
        striped: float,
        seed: int,
        drawn: int,
        device: torch.device,
    ) -> None:
        if capacity % added_together or not capacity:
            raise ValueError(f"`capacity` must be a multiple of `added_together`, {added_together}, got {capacity}.")
        self.vae, self.tokenizer, self.device = vae, tokenizer, device
        self.capacity, self.added_together, self.drawn = capacity, added_together, drawn
        self.frames, self.size, self.two_objects, self.striped = frames, size, two_objects, striped
        self.seed, self.held = seed, 0
        shape = (capacity, vae.config.z_dim, (frames - 1) // 4 + 1, size // 8, size // 8)
        self._latents = torch.empty(shape, dtype=torch.float16, device=device)
        self._ids = torch.empty(capacity, CAPTION_TOKENS, dtype=torch.int64, device=device)
        self._mean, self._std = latent_statistics(vae, device)
        self._next = 0

    @torch.no_grad()
    def add(self) -> None:
        """Draw, render and encode `added_together` new videos."""
        captions, scenes = zip(
            *(
                draw_video(
                    self.seed,
                    self.drawn + number,
                    frames=self.frames,
                    size=self.size,
                    two_objects=self.two_objects,
                    striped=self.striped,
                )
                for number in range(self.added_together)
            )
        )
        packed = pack_scenes(scenes).to(self.device)
        videos = render_batch(packed, frames=self.frames, height=self.size, width=self.size).transpose(1, 2)
        mean = self.vae.encode(videos * 2 - 1).latent_dist.mean
        place = slice(self._next, self._next + self.added_together)
        self._latents[place] = (mean - self._mean) / self._std
        self._ids[place] = to_device(tokenise(self.tokenizer, [str(caption) for caption in captions]), self.device)
        self.drawn += self.added_together
        self._next = place.stop % self.capacity
        self.held = min(self.held + self.added_together, self.capacity)

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch, with replacement.

        Args:
            batch_size: Number of videos.
            generator: Source of randomness, on the pool's device.

        Returns:
            Normalised latents (batch_size, channels, frames, height, width) float32, and the tokens of their captions.
        """
        chosen = torch.randint(self.held, (batch_size,), generator=generator, device=self.device)
        return self._latents[chosen].float(), self._ids[chosen]
