"""Every file of the packages and scripts is written by `blade/common/files.py`, whole or not at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = ("blade", "kernels", "pipelines", "scripts")

WRITERS = {
    "save_file", "savez", "savez_compressed", "savetxt", "imwrite", "imsave", "mimwrite", "mimsave", "open_memmap",
    "copy2", "copyfile", "copyfileobj", "copytree", "makedirs", "renames", "export_to_video", "export_to_gif",
    "write_video",
}  # fmt: skip
"""Functions that write into a path or a file."""

METHODS = {
    "write_text", "write_bytes", "mkdir", "touch", "tofile", "savefig", "save_pretrained", "save_config", "rename",
    "symlink_to", "hardlink_to",
}  # fmt: skip
"""Methods that do, some of them without an argument."""

MODULES = {
    "save": ("torch", "np", "numpy"),
    "replace": ("os",),
    "link": ("os",),
    "symlink": ("os",),
    "copy": ("shutil",),
    "move": ("shutil",),
    "dump": ("json", "pickle", "yaml"),
}
"""Of functions whose names other things have too, the modules."""

OPENERS = {"open", "imopen", "fdopen"}
"""Functions and methods that write with some modes."""

CONTEXTS = {"replaced_whole", "folder_updated", "TemporaryDirectory", "NamedTemporaryFile"}
"""What a `with` statement yields from these is temporary, and so is what is made from it."""

BUFFERS = {"BytesIO", "StringIO"}
"""What these return is in memory."""

ALLOWED = {
    "blade/common/files.py": "is where files are written",
    "blade/benchmarks/card/benchmark.py: start_worker": "what a process says, in a temporary folder",
    "blade/moving_shapes/training/latents.py: __init__": "fills a store in place, batch by batch, so that it can grow",
    "blade/common/locks.py: _taken": "makes the folder of a lock, whose file is the operating system's",
    "blade/profiling/workflow.py: _profiled": "`BladeConfig.save_pretrained` writes through `files`",
    "blade/profiling/workflow.py: _finished": "`BladeConfig.save_pretrained` writes through `files`",
    "kernels/blade_kernels/block_sparse/tuning.py: save": "kernels cannot import `blade`, and replace a file alike",
    "scripts/compare_revisions.py: _started": "logs of processes, in a folder of its own",
    "scripts/compare_revisions.py: _copy_working_tree": "a copy of the sources, in a temporary folder",
    "scripts/compare_revisions_work.py: write_text": "inputs of the work, in a folder of its own",
    "scripts/compare_revisions_work.py: write_json": "inputs of the work, in a folder of its own",
    "scripts/compare_revisions_work.py: main": "the result of the work, in a folder of its own",
    "scripts/fault_fuzz.py": "files that it damages, in a folder of its own",
    "scripts/diffusers_stand_ins.py": "small models in a temporary folder, moved from there through `files`",
    "scripts/unpack.py": "runs where BLADE is not installed, and writes into new folders alone",
    "scripts/try_faults.py": "inputs of commands and small disks, in a folder of its own",
    "scripts/layout_models.py: save": "a file in a temporary folder of its caller",
    "scripts/layout_rows.py: save": "a configuration in a temporary folder of its caller",
    "scripts/time_shapes.py: write_random_model": "a model in a temporary folder of its caller",
}
"""Functions that write by themselves, with the reason."""


def writes(call: ast.Call) -> bool:
    """Return whether a call writes into what its receiver or its arguments name."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in OPENERS:
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        return any(len(mode) <= 4 and set(mode) & set("wax+") for mode in modes)
    if name in MODULES:
        return isinstance(function, ast.Attribute) and ast.unparse(function.value) in MODULES[name]
    if name in METHODS:
        return isinstance(function, ast.Attribute) and bool(call.args or name in ("mkdir", "touch"))
    return name in WRITERS


def temporary_names(function: ast.AST) -> set[str]:
    """Return the names in a function that hold a temporary path or a buffer, or what is made from one."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.withitem) and node.optional_vars and called(node.context_expr) & CONTEXTS:
            names |= {part.id for part in ast.walk(node.optional_vars) if isinstance(part, ast.Name)}
    while True:
        before = len(names)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                made_from = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
                if made_from & names or called(node.value) & (BUFFERS | CONTEXTS):
                    names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if len(names) == before:
            return names


def called(node: ast.AST) -> set[str]:
    """Return the names of the functions that an expression calls."""
    functions = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in functions}


def named(call: ast.Call) -> set[str]:
    """Return the variables in a call's receiver and arguments; `bytes` stands for a target in memory."""
    parts = [call.func, *call.args, *(keyword.value for keyword in call.keywords)]
    names = {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}
    in_memory = call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value == "<bytes>"
    return names | ({"<bytes>"} if in_memory else set())


def functions_of(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield the outermost functions and methods of a file by name, and what stands outside of them."""
    rest: list[ast.stmt] = []
    for statement in tree.body:
        for node in statement.body if isinstance(statement, ast.ClassDef) else [statement]:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, node
            else:
                rest.append(node)
    yield "outside", ast.Module(rest, [])


def unsafe_writes(source: str, path: str) -> set[str]:
    """Return the functions of a file that write elsewhere than into a temporary path or a buffer."""
    found = set()
    for name, function in functions_of(ast.parse(source)):
        temporary = temporary_names(function) | {"<bytes>"}
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and writes(node)]
        if any(not named(call) & temporary for call in calls):
            found.add(f"{path}: {name}")
    return found


def test_every_file_is_written_whole() -> None:
    found: set[str] = set()
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 150
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        if name not in ALLOWED:
            found |= unsafe_writes(path.read_text(encoding="utf-8"), name)
    assert found - set(ALLOWED) == set(), "write through blade/common/files.py"
    assert {name for name in ALLOWED if ": " in name} - found == set(), "allowed in vain"


@pytest.mark.parametrize(
    "line",
    [
        'open(path, "w").write(text)',
        'path.open("ab").write(content)',
        'path.open(mode="r+")',
        "path.write_text(text)",
        "save_file(tensors, path)",
        "torch.save(state, path)",
        "figure.savefig(path)",
        "pipe.save_pretrained(path)",
        "iio.imwrite(path, frames)",
        'av.open(path, mode="w")',
        "shutil.copyfile(source, path)",
        "os.replace(source, path)",
        "path.parent.mkdir(parents=True)",
        "with path.open('wb') as file:\n        shutil.copyfileobj(source, file)",
        "with replaced_whole(path) as temporary:\n        path.write_text(text)",
    ],
)
def test_what_is_planted_is_noticed(line: str) -> None:
    assert unsafe_writes(f"def plant(path, text):\n    {line}\n", "x.py") == {"x.py: plant"}


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        'path.open("rb")',
        "text.replace('a', 'w')",
        "with replaced_whole(path) as temporary:\n        torch.save(state, temporary)",
        "with folder_updated(path) as temporary:\n        place = temporary / 'a'\n        place.write_text(text)",
        "buffer = io.BytesIO()\n    figure.savefig(buffer)",
        'iio.imwrite("<bytes>", frames)',
        "write_files({path: content})",
    ],
)
def test_what_is_temporary_or_in_memory_is_not(line: str) -> None:
    assert unsafe_writes(f"def plant(path, text):\n    {line}\n", "x.py") == set()


def test_no_script_runs_without_ending_by_signals() -> None:
    """`typer.run` alone would leave half-written files behind at SIGTERM; `run_script` and `run_command` do not."""
    for path in sorted((ROOT / "scripts").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "typer.run(" not in text and "\n    app()" not in text, path.name
