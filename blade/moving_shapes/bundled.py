"""The bundled model: its defaults, and the prompts that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from blade.families.registry import example_model

BUNDLED_DEFAULTS = {"height": 96, "width": 96, "frames": 33, "steps": 30, "guidance_scale": 2.0}
"""Values that the shapes model was trained for, with little guidance, since much deforms its shapes; Diffusers' own
defaults are those of the large models."""


def check_prompt(prompt: str) -> None:
    """Check that a prompt names a shape, without which the bundled model draws nothing but the background.

    Raises:
        ValueError: naming the words that the model does not know, and those that it does.
    """
    from blade.moving_shapes import captions

    if not captions.names_shape(prompt):
        unknown = captions.unknown_words(prompt)
        problem = f" It does not know {_named(unknown)}." if unknown else ""
        raise ValueError(
            f"`prompt` must name a shape that the bundled model draws: {', '.join(captions.SHAPES)}; got "
            f'"{prompt}".{problem} {_known()}'
        )


def prompt_warning(prompt: str, negative_prompt: str | None = None) -> str | None:
    """Return what to tell about prompts that the bundled model was not trained on, None if it was."""
    from blade.moving_shapes import captions

    unknown = captions.unknown_words(f"{prompt} {negative_prompt or ''}")
    if unknown:
        return f"The bundled model does not know {_named(unknown)}. {_known()}"
    try:
        captions.parse_caption(prompt)
        return None
    except ValueError:
        return f"The bundled model knows these words, but not in this order. {_known()}"


def _named(unknown: Sequence[str]) -> str:
    """Name words that the model does not know, each with the one that was meant if it is near."""
    from blade.moving_shapes.captions import near_word

    near = {word: near_word(word) for word in unknown}
    return ", ".join(
        f'"{word}"' if meant is None else f'"{word}" (did you mean {meant}?)' for word, meant in near.items()
    )


def _known() -> str:
    """Say what the model knows, and what to take for anything else."""
    from blade.moving_shapes import captions

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
        'It knows sentences such as "a red ball moving right" or "a small striped red ball moving right '
        f'fast and a blue square moving up over a checkered background": {known}. '
        f"For anything else take a real model, for example --model {example_model()}."
    )
