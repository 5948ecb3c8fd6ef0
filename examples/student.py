"""A few-step student on a pipeline: its LoRA, its attention and its sampler, loaded and taken away again."""

import sys
from pathlib import Path

from diffusers import WanPipeline

from blade import blade_summary, load_student, unload_student
from blade.media.video import encode_mp4
from blade.models.source import bundled_model_path

# For a real model: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in bfloat16 on the GPU, with the student "GYP666/VIDEO-BLADE", a
# prompt of your own, and without SIZE, which is the bundled model's.
MODEL, STUDENT = str(bundled_model_path()), "shapes-4-steps"
PROMPT = "a red ball moving right"
SIZE = {"height": 96, "width": 96, "num_frames": 33}


def main(model: str = MODEL, source: str = STUDENT, output: str = "outputs/student.mp4") -> None:
    """Generate a video in as few steps as the student was trained for."""
    pipe = WanPipeline.from_pretrained(model)
    student = load_student(pipe, source)
    print(student)
    sampling = {"num_inference_steps": student.steps, "guidance_scale": student.guidance_scale}
    video = pipe(PROMPT, output_type="pt", **sampling, **SIZE).frames[0]
    print(blade_summary(pipe))
    unload_student(pipe)  # the model itself again
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(video, fps=16))


if __name__ == "__main__":
    main(*sys.argv[1:])
