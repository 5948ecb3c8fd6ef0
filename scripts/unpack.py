"""Install what `pack_offline.py` has packed, without a network: python unpack.py --target ENVIRONMENT.

The new environment sees the packages of the Python that runs this, PyTorch and Triton above all.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path


def unpack(source, folder):
    """Put the packed files of a folder together in another one, and check them.

    Raises:
        ValueError: if a part is missing, or a file is not what was packed.
    """
    listed = json.loads((source / "contents.json").read_text(encoding="utf-8"))
    names = [f"part-{number:02d}.tar" for number in range(listed["parts"])]
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source} must hold {listed['parts']} parts, but lacks {', '.join(missing)}.")
    allowed = set(listed["sha256"])
    for name in names:
        with tarfile.open(source / name) as archive:
            for member in archive:
                whole = re.sub(r"\.\d{3}$", "", member.name)
                if not member.isfile() or not {member.name, whole} & allowed:
                    raise ValueError(f"{name} holds {member.name!r}, which is in no list.")
                content = archive.extractfile(member)
                (folder / member.name).write_bytes(content.read())
    for name, digest in listed["sha256"].items():
        pieces = sorted(folder.glob(f"{name}.[0-9][0-9][0-9]"))
        if pieces:
            with (folder / name).open("wb") as file:
                for piece in pieces:
                    file.write(piece.read_bytes())
                    piece.unlink()
        found = folder / name
        if not found.is_file() or hashlib.sha256(found.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} is not what was packed; carry the parts again.")


def main():
    """Unpack, make an environment, and install."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, required=True, help="folder of the new environment")
    target = parser.parse_args().target
    if target.exists():
        sys.exit(f"error: `target` must be a new folder, got {target}.")
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(Path(__file__).resolve().parent, Path(folder))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        wheels = sorted(str(path) for path in Path(folder).glob("*.whl"))
        venv.create(target, system_site_packages=True, with_pip=True)
        own = sysconfig.get_paths(vars={"base": str(target), "platbase": str(target)})["purelib"]
        outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (Path(own) / "outer.pth").write_text("".join(f"{path}\n" for path in outer), encoding="utf-8")
        python = target / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        line = [str(python), "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", *wheels]
        if subprocess.run(line).returncode:
            sys.exit("error: pip could not install the wheels; see above.")
    print(f"{target} is ready: {python.parent / 'blade-bench'} gpu")


if __name__ == "__main__":
    main()
