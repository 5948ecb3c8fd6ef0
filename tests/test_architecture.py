"""The architecture: layers, circles, loose modules, names of families, and what stays lazy."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import blade

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = {
    "blade": ROOT / "blade",
    "blade_kernels": ROOT / "kernels" / "blade_kernels",
    "blade_pipelines": ROOT / "pipelines" / "blade_pipelines",
}

LAYERS = (
    "blade_kernels",
    "blade.common",
    "blade.token_grid",
    "blade.media",
    "blade.families",
    "blade_pipelines",
    "blade.attention",
    "blade.models",
    "blade.students",
    "blade.moving_shapes",
    "blade.metrics",
    "blade.generation",
    "blade.profiling",
    "blade.evaluation",
    "blade.fleet",
    "blade.distillation",
    "blade.benchmarks",
    "blade.cli",
    "blade",
)
"""Lowest first: a module imports from its own layer and from those below. `blade` itself holds the public names."""

LOOSE_MODULES = 3
"""Most modules that stand in `blade/` by themselves."""

FAMILY_NAME = re.compile(r"(?<![A-Za-z])[Ww][Aa][Nn](?![a-z])|(?<=[a-z])Wan(?![a-z])|(?i:ltx|cogvideo|hunyuan)")
"""Names of model families; "wanted" is none."""

FAMILIES_ALLOWED = ("moving_shapes", "recipes", "assets")
"""Folders of `blade/` that may name a family: they hold data of the bundled model and settings of trainings."""

KERNEL_PACKAGES = {"torch", "triton", "blade_kernels"} | sys.stdlib_module_names
"""Packages that the kernels may import."""

OWN_PACKAGES = {"blade_kernels.block_sparse.cute_libraries": {"cudnn", "flash_attn"}}
"""Packages of single modules, which they import when they are first used."""


def find_modules(folders: dict[str, Path]) -> dict[str, Path]:
    """Return the path of every module by its dotted name; a package's is that of its `__init__.py`."""
    modules = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere in it: in functions and under TYPE_CHECKING too."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            base = parents[: len(parents) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return, by module, the modules that it imports."""
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imported_names(path, module):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def layer_of(module: str) -> int:
    """Return the number of a module's layer: the last whose name it begins with, so that `blade` is the rest."""
    numbers = [number for number, layer in enumerate(LAYERS) if f"{module}.".startswith(f"{layer}.")]
    assert numbers, f"{module} is in no layer"
    return min(numbers)


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports from a layer above the module's own."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if layer_of(other) > layer_of(module)
    ]


def import_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, or an empty list."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph[module]):
            if circle := visit(other):
                return circle
        done.add(path.pop())
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module))), [])


def loose_modules(folder: Path) -> list[str]:
    """Return the modules that stand in a package by themselves."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def repeated_names(folder: Path) -> list[str]:
    """Return the files whose name repeats their folder's."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*.py"))
        if f"_{path.parent.name}_" in f"_{path.stem}_" or f"_{path.parent.name.removesuffix('s')}_" in f"_{path.stem}_"
    ]


def named_families(path: Path) -> list[str]:
    """Return the imports, identifiers and strings of a Python file that name a model family, docstrings aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            names.append(node.value)
        names += [
            value
            for field in ("id", "attr", "arg", "name", "asname", "module")
            if isinstance(value := getattr(node, field, None), str)
        ]
    return [f"{path.name}: {name}" for name in names if FAMILY_NAME.search(name)]


def all_named_families(folder: Path) -> list[str]:
    """Return what names a model family in a package: in its Python files, and anywhere in its templates."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] in FAMILIES_ALLOWED:
            continue
        if path.suffix == ".py":
            found += named_families(path)
        elif path.suffix in (".jinja", ".js", ".css", ".md", ".yaml"):
            text = path.read_text(encoding="utf-8")
            found += [f"{path.name}: {match[0]}" for match in FAMILY_NAME.finditer(text)]
    return found


def run_python(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """The imports of the three packages."""
    return import_graph(find_modules(FOLDERS))


def test_no_import_points_upward(graph: dict[str, set[str]]) -> None:
    assert upward_imports(graph) == []


def test_no_imports_go_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert import_circle(graph) == []


def test_few_modules_are_loose() -> None:
    assert len(loose_modules(FOLDERS["blade"])) <= LOOSE_MODULES


def test_no_file_repeats_its_folder() -> None:
    assert repeated_names(FOLDERS["blade"]) == []


def test_no_family_is_named_in_blade() -> None:
    assert all_named_families(FOLDERS["blade"]) == []


def test_kernels_import_nothing_but_pytorch_and_triton() -> None:
    for module, path in find_modules(FOLDERS).items():
        if module.startswith("blade_kernels"):
            tops = {name.split(".")[0] for name in imported_names(path, module)}
            allowed = KERNEL_PACKAGES | {"__future__"} | OWN_PACKAGES.get(module, set())
            assert tops <= allowed, f"{module} imports {sorted(tops - allowed)}"


@pytest.mark.parametrize(
    ("planted", "check"),
    [
        ("from blade.cli.command import run_command\n", lambda folder, graph: upward_imports(graph)),
        (
            "def later():\n    from blade.attention.config import BladeConfig\n",
            lambda folder, graph: upward_imports(graph),
        ),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from blade.common import tables\n",
            lambda folder, graph: import_circle(graph),
        ),
        ("NAME = 'WanPipeline'\n", lambda folder, graph: all_named_families(folder)),
        ("from diffusers import CogVideoXPipeline\n", lambda folder, graph: all_named_families(folder)),
        ("def hunyuan_size(): ...\n", lambda folder, graph: all_named_families(folder)),
    ],
    ids=["upward", "upward, in a function", "circle, for types alone", "string", "import", "identifier"],
)
def test_what_is_planted_is_noticed(planted, check, tmp_path: Path) -> None:
    """A copy of the sources with one fault in `blade/common/files.py`, which `blade/common/tables.py` imports."""
    folders = {}
    for package, folder in FOLDERS.items():
        folders[package] = tmp_path / package
        for path in folder.rglob("*.py"):
            copy = folders[package] / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    assert check(folders["blade"], import_graph(find_modules(folders))) == []
    with (folders["blade"] / "common" / "files.py").open("a", encoding="utf-8") as file:
        file.write(planted)
    assert check(folders["blade"], import_graph(find_modules(folders)))


def test_planted_files_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    for name in ("one", "two", "three", "evaluation/evaluation_report", "evaluation/report"):
        (tmp_path / f"{name}.py").touch()
    assert len(loose_modules(tmp_path)) == LOOSE_MODULES
    assert repeated_names(tmp_path) == ["evaluation/evaluation_report.py"]


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "scripts", "tests"])
def test_no_folder_shadows_a_package(folder: str) -> None:
    """An importable `kernels` at the root would stand in for Hugging Face's package of that name."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_transformers_diffusers_and_blade_import_together_from_the_root() -> None:
    result = run_python("import transformers, diffusers, blade; from diffusers import WanPipeline; print(WanPipeline)")
    assert result.returncode == 0, result.stderr
    assert "WanPipeline" in result.stdout


def test_importing_blade_imports_nothing_heavy() -> None:
    result = run_python(
        "import sys, blade; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules);"
        "blade.BladeConfig; blade.TokenGrid; assert 'diffusers' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there() -> None:
    assert set(blade.__all__) == {
        "AdaptiveConfig",
        "BladeConfig",
        "BlockMask",
        "FewStepScheduler",
        "PatternTable",
        "TokenGrid",
        "__version__",
        "apply_blade",
        "blade_summary",
        "block_sparse_attention",
        "generate",
        "load_student",
        "push_student",
        "remove_blade",
        "unload_student",
        "use_blade",
    }
    assert set(blade.__all__) <= set(dir(blade))
    for name in set(blade.__all__) - {"__version__"}:
        assert getattr(blade, name).__name__ == name
    assert re.fullmatch(r"\d+\.\d+\.\d+", blade.__version__)


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: blade\.(\w+)$", page, re.MULTILINE))
    assert documented == set(blade.__all__) - {"__version__"}


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = blade.nothing
