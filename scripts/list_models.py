"""Write the table of models in `docs/models.md` from the families' data.

python scripts/list_models.py
"""

from __future__ import annotations

from pathlib import Path

from blade.cli.command import run_script
from blade.common.files import write_files
from blade.families.data import SupportedModel
from blade.families.registry import preset_names, supported_models

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

BEGIN, END = "<!-- begin table of models -->\n", "<!-- end table of models -->\n"
"""Lines around the table."""

HEADINGS = ("model", "Diffusers class", "pipelines", "tasks", "preset", "student preset", "limits")


def main() -> None:
    """Write the table of models."""
    text = PAGE.read_text(encoding="utf-8")
    write_files({PAGE: with_table(text).encode()})


def with_table(page: str) -> str:
    """Return a page with its table of models made anew.

    Raises:
        ValueError: if the page lacks the lines around the table.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have the lines {BEGIN.strip()!r} and {END.strip()!r}.")
    return f"{before}{BEGIN}\n{models_table()}\n{END}{after}"


def models_table() -> str:
    """Return the table as Markdown, a row a transformer class; pipelines that are tested as a whole are bold."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    lines += [_row(name, model) for name, model in supported_models().items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row(name: str, model: SupportedModel) -> tuple[str, ...]:
    students = [preset for preset in model.presets if preset in preset_names("student")]
    pipelines = [f"**`{pipe}`**" if pipe in model.tested else f"`{pipe}`" for pipe in model.pipelines]
    limits = [model.limits, *(f"`{pipe}` is refused: {reason}" for pipe, reason in model.refused.items())]
    return (
        model.title,
        f"`{name}`",
        ", ".join(pipelines),
        model.tasks,
        ", ".join(f"`{preset}`" for preset in model.presets),
        ", ".join(f"`{preset}`" for preset in students),
        "; ".join(filter(None, limits)),
    )


if __name__ == "__main__":
    run_script(main)
