"""A growing store of encoded training videos, on disk, filled while the transformer trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from blade.common.files import replaced_whole, take_room
from blade.common.training_log import numpy_rng

from ..captions import Caption, sample_caption
from ..world import Scene, render, sample_scene

LATENT_STREAM = 3
ENCODED_TOGETHER = 8
"""Videos encoded in one batch: almost twice as fast on a CPU as one by one."""


def draw_video(
    seed: int, index: int, *, frames: int, size: int, two_objects: float, striped: float
) -> tuple[Caption, Scene]:
    """Draw training video number `index`; see `LatentStore` for the arguments."""
    rng = numpy_rng(seed, LATENT_STREAM, frames, index)
    while True:
        objects = 2 if rng.random() < two_objects else 1
        caption = sample_caption(rng, objects=objects, striped=striped)
        try:
            return caption, sample_scene(caption, rng, frames=frames, height=size, width=size)
        except ValueError:  # a small canvas has no room for what is large and fast
            continue


def latent_statistics(vae: AutoencoderKLWan, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of a VAE's latents, both (channels, 1, 1, 1)."""
    mean, std = (
        torch.tensor(values, device=device)[:, None, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


class LatentStore:
    """Training video number i is drawn from (seed, i) alone, so that a store can be filled again as it was.

    Args:
        path: The file that holds the latents, made if it is missing.
        vae: Encodes the videos; its config holds the latents' mean and standard deviation.
        capacity: How many videos there are in all.
        frames: Frames of a video.
        size: Edge of its canvas in pixels.
        two_objects: Fraction of captions with two objects.
        striped: Fraction of objects that are striped.
        seed: Seed of all videos.
        device: Where to encode.
    """

    def __init__(
        self,
        path: Path,
        vae: AutoencoderKLWan,
        *,
        capacity: int,
        frames: int,
        size: int,
        two_objects: float,
        striped: float,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.vae, self.frames, self.size, self.seed, self.device = vae, frames, size, seed, device
        self.two_objects, self.striped = two_objects, striped
        shape = (capacity, vae.config.z_dim, (frames - 1) // 4 + 1, size // 8, size // 8)
        if not path.exists():
            with replaced_whole(path) as temporary:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
                take_room(temporary)
        self._latents = np.lib.format.open_memmap(path, mode="r+")
        if self._latents.shape != shape:
            raise ValueError(f"`path` holds latents of shape {self._latents.shape}, expected {shape}: {path}.")
        self._captions: list[Caption] = []
        self._mean, self._std = latent_statistics(vae, device)

    def fill(self, count: int) -> None:
        """Make at least `count` videos available, encoding those that the file does not hold yet."""
        count = min(count, len(self._latents))
        while len(self._captions) < count:
            # Always the same batches, so that a run that goes on computes the same latents.
            indices = range(len(self._captions), min(len(self._captions) + ENCODED_TOGETHER, len(self._latents)))
            captions, scenes = zip(*(self._draw(index) for index in indices))
            if not all(self._latents[index].any() for index in indices):
                self._latents[indices.start : indices.stop] = self._encode(scenes)
            self._captions += captions

    def sample(self, rng: np.random.Generator, batch_size: int) -> tuple[torch.Tensor, list[str]]:
        """Draw a batch of those that are available, each at most once.

        Returns:
            Normalised latents (batch_size, channels, frames, height, width) and their captions.
        """
        chosen = rng.choice(len(self._captions), size=batch_size, replace=False)
        latents = torch.from_numpy(self._latents[np.sort(chosen)].astype(np.float32))
        return latents.to(self.device), [str(self._captions[index]) for index in np.sort(chosen)]

    def _draw(self, index: int) -> tuple[Caption, Scene]:
        return draw_video(
            self.seed,
            index,
            frames=self.frames,
            size=self.size,
            two_objects=self.two_objects,
            striped=self.striped,
        )

    @torch.no_grad()
    def _encode(self, scenes: Sequence[Scene]) -> np.ndarray:
        videos = [render(scene, frames=self.frames, height=self.size, width=self.size) for scene in scenes]
        mean = self.vae.encode(torch.stack(videos).transpose(1, 2).to(self.device) * 2 - 1).latent_dist.mean
        latents: np.ndarray = ((mean - self._mean) / self._std).half().cpu().numpy()
        return latents
