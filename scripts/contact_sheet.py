"""Show frames of videos as a picture: python scripts/contact_sheet.py outputs/*.mp4 --output sheet.png."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from blade.common.files import write_files
from blade.media.pictures import contact_sheet, encode_png
from blade.media.video import read_mp4


def main(
    videos: Annotated[list[Path], typer.Argument(help="Videos of one size; a row each.")],
    output: Annotated[Path, typer.Option(help="The PNG.")],
    columns: Annotated[int, typer.Option(help="Frames of each video.")] = 6,
) -> None:
    """Write a picture of evenly spaced frames, each row labelled with the prompt in the JSON beside its video."""
    rows: dict[str, torch.Tensor] = {}
    for path in videos:
        record = path.with_suffix(".json")
        label = json.loads(record.read_text(encoding="utf-8"))["prompt"] if record.exists() else path.stem
        rows[f"{label} ({path.stem})" if label in rows else label] = read_mp4(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_files({output: encode_png(contact_sheet(rows, columns=columns))})


if __name__ == "__main__":
    typer.run(main)
