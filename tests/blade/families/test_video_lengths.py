"""Numbers of frames at equal steps, and the latent frames that stand for them."""

import pytest

from blade.families.video_lengths import VideoLengths


@pytest.mark.parametrize(("frames", "latents", "longest"), [(1, 1, 1), (81, 21, 81), (83, 21, 81), (84, 21, 81)])
def test_a_compression_of_four(frames, latents, longest):
    lengths = VideoLengths.of_compression(4)
    assert (lengths.latent_frames(frames), lengths.longest(frames)) == (latents, longest)


@pytest.mark.parametrize(("frames", "longest"), [(20, 22), (22, 22), (38, 22), (39, 39), (500, 73)])
def test_chunks_with_a_limit(frames, longest):
    lengths = VideoLengths(first=22, step=17, last=73, first_latents=7, latents_per_step=5, rule="17n + 5")
    assert lengths.longest(frames) == longest
    assert lengths.latent_frames(longest) == 7 + (longest - 22) // 17 * 5
