"""Combine videos into one picture: python scripts/contact_sheet.py outputs/*.mp4 --output sheet.png."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from blade.cli.command import run_script
from blade.common.files import check_writable, write_files
from blade.common.names import check_no_input
from blade.media.pictures import ANIMATION_EXTENSIONS, contact_sheet, encode_animation, encode_png, side_by_side
from blade.media.video import read_mp4


def main(
    videos: Annotated[list[Path], typer.Argument(help="Videos of equal size.")],
    output: Annotated[Path, typer.Option(help="A .png of frames, or an animated .webp, .gif or .apng.")],
    columns: Annotated[int, typer.Option(help="Frames of each video in a .png.")] = 6,
    fps: Annotated[float, typer.Option(help="Frames per second of an animation.")] = 8,
) -> None:
    """Write one picture of several videos, each labelled with the prompt from its JSON file.

    A .png has a row of evenly spaced frames for each video; an animation shows the videos side by side.
    """
    check_no_input([output], dict.fromkeys(videos, "videos"))
    check_writable(output)
    rows: dict[str, torch.Tensor] = {}
    for path in videos:
        record = path.with_suffix(".json")
        label = json.loads(record.read_text(encoding="utf-8"))["prompt"] if record.exists() else path.stem
        rows[f"{label} ({path})" if label in rows else label] = read_mp4(path)
    if output.suffix in ANIMATION_EXTENSIONS:
        picture = encode_animation(side_by_side(rows), fps, output.suffix)
    else:
        picture = encode_png(contact_sheet(rows, columns=columns))
    write_files({output: picture})


if __name__ == "__main__":
    run_script(main)
