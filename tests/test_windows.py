"""What Windows lacks is not needed: commands, locks and files work without it, in a console that knows few characters.

A process in which the packages find nothing that Windows has not stands for Windows, which runs none of this here.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from blade.common.leftovers import temporary_path
from blade.common.locks import PATTERN
from blade.common.names import is_portable
from blade.evaluation.output_files import reference_path
from blade.evaluation.prompts import EvaluationPrompt
from blade.evaluation.runs import RunSettings
from blade.evaluation.videos import _write_vbench, video_path
from blade.generation.naming import comparison_path, default_output, record_path
from blade.generation.request import GenerationRequest

ROOT = Path(__file__).resolve().parents[1]

HIDDEN = """
import builtins, io, os, sys, types, warnings
import psutil

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "triton"}
imported, opened, linked = builtins.__import__, io.open, os.readlink

def asks(depth):
    return sys._getframe(depth).f_globals.get("__name__", "").partition(".")[0]

def limited_import(name, globals=None, locals=None, fromlist=(), level=0):
    asking = (globals or {}).get("__name__", "").partition(".")[0]
    if name.partition(".")[0] in MODULES and asking in ("blade", "blade_kernels", "blade_pipelines", "filelock"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return imported(name, globals, locals, fromlist, level)

def limited(function):
    def call(path, *arguments, **options):
        if str(path).startswith("/proc") and asks(2) != "psutil":
            raise FileNotFoundError(2, "No such file or directory", path)
        return function(path, *arguments, **options)
    return call

builtins.__import__, os.readlink = limited_import, limited(linked)
builtins.open = io.open = limited(opened)
for name in ("fork", "forkpty", "posix_fallocate", "killpg", "setsid", "getloadavg", "chown", "mkfifo"):
    delattr(os, name)
psutil.Process.memory_info = lambda self: types.SimpleNamespace(rss=2**30, peak_wset=3 * 2**30)
warnings.filterwarnings("error", category=EncodingWarning, module=r"blade|__main__")
"""
"""Hides, from BLADE and from the library of its locks, what Python has on Linux alone."""


@pytest.fixture
def run_there(tmp_path: Path):
    """Return a function that runs Python there, and returns what it printed: bytes."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HIDDEN, encoding="utf-8")

    def run(code: str) -> bytes:
        paths = [str(site), *sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONIOENCODING": "cp1252",
            "PYTHONWARNDEFAULTENCODING": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr.decode("cp1252", "replace")[-3000:]
        return done.stdout

    return run


FILES = """
from pathlib import Path
from blade.common import files, locks, terminal

terminal.write_out_what_streams_lack()
folder = Path("new folder")
with locks.folder_locked(folder), locks.file_locked(folder / "a.json"):
    files.write_files({folder / "a.json": b"{}", folder / "b.json": b"1"})
    files.write_files({folder / "a.json": b"[]", folder / "b.json": b"2"})
    files.append_json_line(folder / "log.jsonl", {"prompt": "\\u732b"})
    with files.folder_updated(folder) as temporary:
        (temporary / "c.txt").write_text("c", encoding="utf-8")
    with files.replaced_whole(folder / "d") as temporary:
        temporary.write_bytes(bytes(100))
        files.take_room(temporary)
    files.check_writable(folder / "e")
    files.sweep_leftovers(folder)
assert files.read_json_lines(folder / "log.jsonl") == [{"prompt": "\\u732b"}]
terminal.print_line(sorted(path.name for path in folder.iterdir()))
terminal.print_line("\\u732b \\u2192 caf\\u00e9")
"""


def test_files_and_locks(run_there) -> None:
    printed = run_there(FILES).decode("cp1252").splitlines()
    assert printed == ["['a.json', 'b.json', 'c.txt', 'd', 'log.jsonl']", r"\u732b \u2192 café"]


OTHERS = """
import sys
import torch
from blade import BladeConfig
from blade.common.machine import describe_machine, peak_memory_gib

assert peak_memory_gib(torch.device("cpu")) == 3
assert describe_machine(torch.device("cpu"))["device"]
BladeConfig(sparsity=0.7).save_pretrained("config")
assert BladeConfig.from_pretrained("config").sparsity == 0.7
from blade.cli import bench, distill, evaluate, generate, profile
for command in (bench, distill, evaluate, generate, profile):
    try:
        command.main(["--help"])
    except SystemExit as ended:
        assert not ended.code, command
try:
    generate.main(["--prompt", "a red ball moving right, \\u732b", "--dry-run", "--device", "cpu"])
except SystemExit as ended:
    assert not ended.code
assert "triton" not in {name.partition(".")[0] for name in sys.modules if name.startswith("blade")}
"""


@pytest.mark.slow
def test_commands_and_configurations(run_there) -> None:
    printed = run_there(OTHERS).decode("cp1252")
    assert printed.count("Usage: ") == 5 and "attention" in printed


@pytest.mark.slow
def test_a_video_is_made(run_there, tmp_path: Path) -> None:
    options = ["--prompt=a red ball moving right", "--student=none", "--steps=2", "--frames=5", "--device=cpu"]
    run_there(f"from blade.cli.generate import main; main({[*options, '--output=here/video.mp4']})")
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["video.json", "video.mp4"]


@pytest.mark.parametrize(
    "text", ["CON", "nul", "aux.", "com1", "LPT9", "a:b", "what?", "a.", "x ", "conin$", "..", "*"]
)
def test_no_file_has_a_name_that_windows_has_not(text: str, tmp_path: Path) -> None:
    """Whatever a prompt is, and whatever a run or a video is called."""
    video = default_output(GenerationRequest(prompt=text))
    prompt = EvaluationPrompt(text=text, seed=0)
    paths = [video, record_path(video), comparison_path(video), temporary_path(tmp_path / text)]
    paths += [
        video_path(tmp_path, "run", prompt),
        reference_path(tmp_path, "run", prompt),
        Path(PATTERN.replace("*", "1")),
    ]
    _write_vbench(tmp_path, ["run"], {prompt: {"run": Path(__file__)}})
    paths += [path for path in (tmp_path / "run").iterdir()]
    assert len(paths) == 8 and [path.name for path in paths if not is_portable(path.name)] == []
    with pytest.raises(ValueError, match="`name` must be"):
        RunSettings(name=text)


def texts_without_encoding(source: str) -> list[int]:
    """Return the lines of a file that read or write text in the encoding of the machine."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        texts = [node.value for node in (*call.args, *(word.value for word in call.keywords))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
        named = any(word.arg == "encoding" for word in call.keywords) or "utf-8" in texts
        binary = any(re.fullmatch(r"[rwax+]*b[rwax+]*", text) for text in texts)
        if name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute) and not named:
            found.append(call.lineno)
        is_open = name == "open" and (isinstance(call.func, ast.Name) or not call.args or texts)
        if is_open and not named and not binary and ast.unparse(call.func) not in ("av.open",):
            found.append(call.lineno)
    return found


def test_texts_have_an_encoding() -> None:
    """Without one, Windows reads and writes them in another than the machine that made them."""
    found = {}
    for folder in ("blade", "kernels", "pipelines", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if lines := texts_without_encoding(path.read_text(encoding="utf-8")):
                found[path.relative_to(ROOT).as_posix()] = lines
    assert found == {}
    planted = "path.read_text()\npath.write_text(text)\nopen(path)\npath.open('w')\nopen(path, 'rb')\n"
    assert texts_without_encoding(planted) == [1, 2, 3, 4]


def test_triton_is_no_dependency_elsewhere_than_on_linux() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    required = [*project["dependencies"], *(line for extra in extras for line in extra)]
    lines = [line for line in required if line.startswith("triton")]
    assert lines and all("sys_platform == 'linux'" in line for line in lines)


def test_continuous_integration_tries_windows() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["windows"]
    assert job["runs-on"] == "windows-latest"
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    assert "make" not in commands and "not slow" in commands
    for path in re.findall(r"tests/\S+", commands):
        assert (ROOT / path).exists(), path
