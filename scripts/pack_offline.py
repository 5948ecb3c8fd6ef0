"""Pack BLADE and the packages that it needs for a machine that reaches no network, in parts of a limited size.

    python scripts/pack_offline.py packed --python 3.12 --extras plots
    # carry the parts there, all into one folder, then
    python unpack.py --target /path/of/a/new/environment

The parts hold wheels for that machine's Python. PyTorch and Triton, which it must have, are left out. `unpack.py`
stands beside them, needs Python alone, and checks every file before it installs.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from blade.cli.command import run_script
from blade.common.files import check_writable, write_files
from blade.common.terminal import print_line

ROOT = Path(__file__).resolve().parents[1]

UNPACK = Path(__file__).with_name("unpack.py")

CUTE = "nvidia-(cudnn-frontend|cutlass-dsl)|cuda-(bindings|pathfinder|python)"
"""How the names begin of packages by NVIDIA that PyTorch does not bring: those of the extra `cute`."""

THERE = re.compile(f"blade-video|torch|triton|(?!{CUTE})(nvidia|cuda)-.*")
"""Names of packages that the machine has, and BLADE's own, whose wheel is built."""

WITHOUT_WHEELS = ("antlr4-python3-runtime==4.9.3",)
"""Packages in pure Python that have no wheels on the index: what OmegaConf needs."""

PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(34, 4, -1)), "manylinux2014_x86_64")
"""Platforms whose wheels run there: glibc up to 2.34."""

MIB = 2**20

ROOM = 64 * 1024
"""Bytes of a part that its own headers may take, beside a header for each member."""


def download(folder: Path, python: str, extras: str) -> None:
    """Build BLADE's wheel, and download those of the packages that it needs, into an empty folder.

    Args:
        folder: the folder.
        python: version of Python there, such as "3.12".
        extras: extras of BLADE, such as "plots", separated by commas.
    """
    pip = [sys.executable, "-m", "pip"]
    built = [str(ROOT), *WITHOUT_WHEELS]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *built], check=True)
    (own,) = folder.glob("blade_video-*.whl")
    there = ["--only-binary=:all:", "--find-links", str(folder), "--python-version", python, "--implementation", "cp"]
    there += [word for platform in PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as resolved:
        report = Path(resolved) / "report.json"
        dry = ["--dry-run", "--ignore-installed", "--report", str(report), "--target", resolved]
        named = f"{own}[{extras}]" if extras else str(own)
        subprocess.run([*pip, "install", "--quiet", *dry, *there, named], check=True)
        wanted = needed_packages(json.loads(report.read_text(encoding="utf-8")))
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), *there, *wanted], check=True)


def needed_packages(report: dict[str, Any]) -> list[str]:
    """Return NAME==VERSION of the packages of pip's report but those of `THERE`."""
    found = [item["metadata"] for item in report["install"]]
    named = [(re.sub(r"[-_.]+", "-", item["name"]).lower(), item["version"]) for item in found]
    return sorted(f"{name}=={version}" for name, version in named if not THERE.fullmatch(name))


def pieces(files: Sequence[Path], most: int) -> Iterator[tuple[str, Path, int, int]]:
    """Yield name, file, first byte and number of bytes of pieces of files, none larger than `most`."""
    for path in files:
        size = path.stat().st_size
        starts = range(0, size, most) if size > most else (0,)
        for number, start in enumerate(starts):
            name = path.name if size <= most else f"{path.name}.{number:03d}"
            yield name, path, start, min(most, size - start)


def pack(files: Sequence[Path], output: Path, part_bytes: int) -> list[Path]:
    """Write files into tar archives of a limited size, with the list of them and the program that unpacks them.

    Args:
        files: the files, whose names differ.
        output: a folder.
        part_bytes: most bytes of an archive; larger files are cut.

    Returns:
        Everything written, the archives first.

    Raises:
        ValueError: if a part cannot hold a piece.
        OutputError: if a file cannot be written.
    """
    if part_bytes < 4 * ROOM:
        raise ValueError(f"`part_mib` must be at least {4 * ROOM / MIB:g}, got {part_bytes / MIB:g}.")
    parts: list[list[tuple[str, Path, int, int]]] = [[]]
    used = 0
    for piece in sorted(pieces(files, part_bytes - ROOM), key=lambda one: -one[3]):
        needed = piece[3] + 2048  # with its header, in blocks of 512
        if used + needed > part_bytes - ROOM + 2048:
            parts.append([])
            used = 0
        parts[-1].append(piece)
        used += needed
    contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    listed = json.dumps({"parts": len(parts), "sha256": contents}, indent=2) + "\n"
    written = []
    for number, part in enumerate(parts):
        written.append(output / f"part-{number:02d}.tar")
        write_files({written[-1]: _archive(part)})
    others = {output / "contents.json": listed.encode(), output / UNPACK.name: UNPACK.read_bytes()}
    write_files(others)
    return [*written, *others]


def _archive(part: Sequence[tuple[str, Path, int, int]]) -> bytes:
    """Return pieces as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w") as archive:
        for name, path, start, size in part:
            member = tarfile.TarInfo(name)
            member.size = size
            with path.open("rb") as file:
                file.seek(start)
                archive.addfile(member, io.BytesIO(file.read(size)))
    return buffer.getvalue()


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the parts.")],
    python: Annotated[str, typer.Option(help="Version of Python on the machine.")] = "3.12",
    extras: Annotated[str, typer.Option(help="Extras of BLADE, separated by commas.")] = "plots",
    part_mib: Annotated[float, typer.Option(help="Most MiB of a part.")] = 60,
) -> None:
    """Download, and pack into parts."""
    if not re.fullmatch(r"3\.\d+", python):
        raise ValueError(f"`python` must be a version such as 3.12, got {python!r}.")
    check_writable(output / "part-00.tar")
    with tempfile.TemporaryDirectory() as folder:
        download(Path(folder), python, extras)
        files = sorted(Path(folder).glob("*.whl"))
        for path in pack(files, output, int(part_mib * MIB)):
            print_line(f"{path.stat().st_size / MIB:6.1f} MiB  {path}")


if __name__ == "__main__":
    run_script(main)
