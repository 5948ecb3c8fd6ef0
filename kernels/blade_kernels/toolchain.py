"""Detection of the compilers that PyTorch and Triton need at run time."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

_TIMEOUT_S = 60.0


@functools.cache
def missing_cpp_toolchain() -> str | None:
    """Return why the C++ that PyTorch generates for the CPU cannot be built here, or None if it can.

    Builds a tiny extension, once per process, with the compiler that PyTorch would use: `CXX`, or g++ (clang++ on
    macOS, Microsoft's cl on Windows).
    """
    usual = {"darwin": "clang++", "win32": "cl"}
    compiler = os.environ.get("CXX") or usual.get(sys.platform, "g++")
    return _build_failure(compiler, "module.cpp")


@functools.cache
def missing_c_toolchain() -> str | None:
    """Return why Triton's launcher, which is C, cannot be built here, or None if it can.

    Builds a tiny extension, once per process, with the compiler that Triton would use: `CC`, or gcc or clang. On
    Windows the package `triton-windows` brings one.
    """
    if sys.platform == "win32" and "CC" not in os.environ:
        return None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
    return _build_failure(compiler, "module.c")


def _build_failure(compiler: str, source: str) -> str | None:
    """Build an empty Python extension and return the reason if that fails."""
    if shutil.which(compiler) is None:
        return f"the compiler {compiler!r} is not there"
    includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any((Path(folder) / "Python.h").is_file() for folder in includes):
        return f"Python.h is not in {', '.join(sorted(includes))}"
    with tempfile.TemporaryDirectory() as folder:
        program = "#include <Python.h>\nint main(void) { return 0; }\n"
        (Path(folder) / source).write_text(program, encoding="utf-8")
        included = [f"-I{path}" for path in sorted(includes)]
        if Path(compiler).stem.lower() in ("cl", "clang-cl"):
            libraries = Path(sys.base_prefix) / "libs"
            command = [compiler, "/nologo", "/LD", *included, source, "/link", f"/LIBPATH:{libraries}"]
        else:
            command = [compiler, "-shared", "-fPIC", *included, source, "-o", "module.so"]
        try:
            built = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the compiler {compiler!r} does not run: {error}"
    if built.returncode:
        lines = (built.stderr or built.stdout).strip().splitlines() or ["no message"]
        return f"the compiler {compiler!r} fails: {lines[0]}"
    return None
