"""A pattern for every attention head: profile a model, write the table, and apply it."""

import sys
from pathlib import Path

from diffusers import WanPipeline

from blade import BladeConfig, apply_blade, blade_summary
from blade.models.source import bundled_model_path
from blade.profiling.objectives import Budget
from blade.profiling.workflow import ProfileRequest, profile_attention

# For a real model: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" with its own size and 50 steps, and a few prompts of
# the kind that it will be used with.
MODEL = str(bundled_model_path())
PROMPTS = ("a red ball moving right",)
STEPS, HEIGHT, WIDTH, FRAMES = 4, 96, 96, 33


def main(model: str = MODEL, folder: str = "outputs/patterns") -> None:
    """Find patterns at a density of 0.5, and generate a video with them."""
    generation = {"model": model, "steps": STEPS, "height": HEIGHT, "width": WIDTH, "frames": FRAMES}
    budget = Budget(target_density=0.5)
    request = ProfileRequest.of(generation, prompts=PROMPTS, output=Path(folder), budget=budget, influence_prompts=0)
    print(profile_attention(request))

    pipe = WanPipeline.from_pretrained(model)
    apply_blade(pipe, BladeConfig.from_pretrained(folder))
    pipe("a blue square moving up", height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=STEPS)
    print(blade_summary(pipe))


if __name__ == "__main__":
    main(*sys.argv[1:])
