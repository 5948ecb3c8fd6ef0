"""`blade.generate`: a video from a prompt, in one call."""

from __future__ import annotations

from typing import Any

from blade.common.terminal import logger
from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest, default_student, lost_student
from blade.generation.run import Generation, run_request


def generate(prompt: str, **options: Any) -> Generation:
    """Generate a video as `blade-generate` does, without writing files.

    The bundled model, and its student of 8 steps, make it where the options name nothing else. For a pipeline of your
    own use `apply_blade` and call it.

    Args:
        prompt: the content of the video.
        options: the command's options as fields of `GenerationRequest`, such as `steps=8`, `seed=3`,
            `model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"`, `sparsity=0.6`; `student=None` is the model itself.

    Returns:
        The video, (frames, 3, H, W) in [0, 1], with its seconds and densities.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for a request that cannot be met.
        ModelError: if there is no such model, or it cannot be used.
        NonFiniteError: if the latents turn infinite or not-a-number.
        MemoryError: if the device has too little memory.

    Example:
        ```python
        from blade import generate

        made = generate("a red ball moving right", seed=3)
        print(made.video.shape, made.seconds_denoising)
        ```
    """
    if notice := lost_student(options):
        logger.warning(notice)
    if "student" not in options:
        options["student"] = default_student(options)
    model, request = prepare_model(GenerationRequest(prompt=prompt, **options))
    return run_request(model, request)
