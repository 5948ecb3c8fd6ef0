"""The bundled model: its defaults, and the prompts that it was trained on."""

from __future__ import annotations

from blade.families.registry import example_model

BUNDLED_DEFAULTS = {"height": 96, "width": 96, "frames": 33, "steps": 30, "guidance_scale": 2.0}
"""Values that the shapes model was trained for, with little guidance, since much deforms its shapes; Diffusers' own
defaults are those of the large models."""


def prompt_warning(prompt: str, negative_prompt: str | None = None) -> str | None:
    """Return what to tell about prompts that the bundled model was not trained on, None if it was."""
    from blade.moving_shapes import captions

    unknown = captions.unknown_words(f"{prompt} {negative_prompt or ''}")
    if unknown:
        problem = "The bundled model does not know " + ", ".join(f'"{word}"' for word in unknown) + "."
    else:
        try:
            captions.parse_caption(prompt)
            return None
        except ValueError:
            problem = "The bundled model knows these words, but not in this order."
    kinds = {
        "colours": captions.COLOURS,
        "shapes": captions.SHAPES,
        "directions": captions.DIRECTIONS,
        "sizes": captions.SIZES,
        "fills": captions.FILLS,
        "speeds": captions.SPEEDS,
        "backgrounds": captions.BACKGROUNDS,
    }
    known = "; ".join(f"{kind} {', '.join(words)}" for kind, words in kinds.items())
    return (
        f'{problem} It knows sentences such as "a red ball moving right" or "a small striped red ball moving right '
        f'fast and a blue square moving up over a checkered background": {known}. '
        f"For anything else take a real model, for example --model {example_model()}."
    )
