"""An evaluation's report as files: JSON, Markdown, a plot, and an HTML page that loads nothing but its videos."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from blade.common.files import write_files
from blade.common.tables import markdown_block, markdown_table, markdown_text
from blade.evaluation.report import facts, notes, tables
from blade.evaluation.videos import VideoLayout, poster

TEMPLATE = "report.html.jinja"
"""The page's template, in this file's folder."""


@dataclass(frozen=True, kw_only=True)
class Player:
    """A video of the page."""

    path: PurePath
    """Relative to the page."""
    poster: bytes
    """JPEG that is shown before the video is loaded, which is when it is played; embedded in the page."""


def markdown(report: dict[str, Any]) -> str:
    """Render the report as a Markdown page."""
    summary, *details = facts(report)
    lines = ["# Evaluation", "", markdown_text(summary), "", markdown_block(report["command"]), ""]
    for line in details:
        lines += [markdown_text(line), ""]
    for table in tables(report):
        lines += [f"## {table.title}", "", *markdown_table(table.headings, table.rows), ""]
    for note in notes(report):
        lines += [note, ""]
    return "\n".join(lines)


def html(report: dict[str, Any], *, pictures: Mapping[str, bytes], videos: Mapping[str, Player]) -> str:
    """Render the report as an HTML page, in the reader's light or dark scheme, that loads nothing from elsewhere.

    Args:
        report: The result of `make_report`.
        pictures: PNGs by heading, embedded in the page.
        videos: Videos by caption.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        facts=facts(report),
        notes=notes(report),
        command=report["command"],
        tables=tables(report),
        pictures={title: _base64(picture) for title, picture in pictures.items()},
        videos={caption: (quote(video.path.as_posix()), _base64(video.poster)) for caption, video in videos.items()},
        runs=[run["name"] for run in report["runs"]],
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def write_report(report: dict[str, Any], folder: Path, laid_out: VideoLayout) -> list[Path]:
    """Write `report.json`, `report.md`, `report.html`, and `report.png` if it can be drawn; all or none.

    Args:
        report: The result of `make_report`.
        folder: The evaluation's folder.
        laid_out: The result of `lay_out_videos`.

    Returns:
        The files' paths.

    Raises:
        OutputError: If a file cannot be written.
    """
    pictures = {}
    try:
        from blade.evaluation.plot import plot_report
    except ImportError:  # matplotlib is in the extra `plots`
        plot = None
    else:
        plot = plot_report(report)
    if plot is not None:
        pictures["Plot"] = plot
    if laid_out.sheet is not None:
        pictures["Middle frames"] = laid_out.sheet
    videos = {
        f"{prompt.text} (seed {prompt.seed})": Player(path=path.relative_to(folder), poster=poster(path))
        for prompt, path in laid_out.shown.items()
    }
    files = {
        folder / "report.json": (json.dumps(report, indent=2) + "\n").encode(),
        folder / "report.md": markdown(report).encode(),
        folder / "report.html": html(report, pictures=pictures, videos=videos).encode(),
    }
    if plot is not None:
        files[folder / "report.png"] = plot
    write_files(files)
    return list(files)
