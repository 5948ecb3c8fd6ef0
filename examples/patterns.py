"""A pattern for every attention head: profile a model, write the table, and generate a video with it."""

import sys
from pathlib import Path

from blade import generate
from blade.profiling.objectives import Budget
from blade.profiling.request import ProfileRequest
from blade.profiling.workflow import profile_attention

# For a real model: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", a few prompts of the kind that it will be used with, and
# SETTINGS = {}, which takes the size and the steps that its authors recommend.
MODEL = "bundled"
PROMPTS = ("a red ball moving right",)
SETTINGS = {"height": 96, "width": 96, "frames": 33, "steps": 4}


def main(model: str = MODEL, folder: str = "outputs/patterns") -> None:
    """Find patterns at a density of 0.5, and use them for another prompt."""
    generation = {"model": model, **SETTINGS}
    budget = Budget(target_density=0.5)
    # without the last option, which saves time here, errors count by what they do to a video
    request = ProfileRequest.of(generation, prompts=PROMPTS, output=Path(folder), budget=budget, influence_prompts=0)
    print(profile_attention(request))

    # in a Diffusers pipeline: apply_blade(pipe, BladeConfig.from_pretrained(folder))
    print(generate("a blue square moving up", config=folder, **generation).summary)


if __name__ == "__main__":
    main(*sys.argv[1:])
