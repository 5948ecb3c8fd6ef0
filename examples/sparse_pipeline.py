"""Sparse attention in a Diffusers pipeline of your own."""

import sys
from pathlib import Path

from diffusers import WanPipeline

from blade import apply_blade, blade_summary, remove_blade
from blade.media.video import encode_mp4
from blade.models.source import bundled_model_path

# For a real model: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", loaded with dtype=torch.bfloat16 and moved .to("cuda"), with a
# prompt of your own and without SETTINGS, which are the bundled model's.
MODEL = str(bundled_model_path())
PROMPT = "a red ball moving right"
SETTINGS = {"height": 96, "width": 96, "num_frames": 33, "num_inference_steps": 10, "guidance_scale": 2.0}


def main(model: str = MODEL, output: str = "outputs/sparse.mp4") -> None:
    """Generate a video with the model's preset at another sparsity, and print what became of it."""
    pipe = WanPipeline.from_pretrained(model)
    apply_blade(pipe, sparsity=0.6)
    video = pipe(PROMPT, output_type="pt", **SETTINGS).frames[0]
    print(blade_summary(pipe))
    remove_blade(pipe)  # from here on Diffusers' own attention again
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(video, fps=16))


if __name__ == "__main__":
    main(*sys.argv[1:])
