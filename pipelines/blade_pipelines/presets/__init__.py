"""Presets, one module a family: values for ordinary weights (training-free) and for trained students, kept apart."""

from blade_pipelines.presets import cogvideox, hunyuan_video, ltx_video, wan

TRAINING_FREE = {
    **wan.TRAINING_FREE,
    **cogvideox.TRAINING_FREE,
    **hunyuan_video.TRAINING_FREE,
    **ltx_video.TRAINING_FREE,
}
STUDENT = {**wan.STUDENT, **cogvideox.STUDENT}
