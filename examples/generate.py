"""A video from a prompt in one call, as `blade-generate` makes it."""

import sys
from pathlib import Path

from blade import generate
from blade.media.video import encode_mp4

# For a real model: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", with a prompt of your own, without the size below, which is the
# bundled model's, and perhaps with student="GYP666/VIDEO-BLADE".
MODEL = "bundled"
PROMPT = "a red ball moving right"
SIZE = {"height": 96, "width": 96, "frames": 33}


def main(model: str = MODEL, output: str = "outputs/generate.mp4") -> None:
    """Generate a video, write it, and print what it cost."""
    result = generate(PROMPT, model=model, seed=3, **SIZE)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(result.video, fps=16))
    print(f"{path}: run density {result.run_density:.2f}, denoising {result.seconds_denoising:.1f} s")
    print(result.summary)


if __name__ == "__main__":
    main(*sys.argv[1:])
