"""Who may import whom, what stays lazy, and what a wheel holds."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import blade

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "blade": ROOT / "blade",
    "blade_kernels": ROOT / "kernels" / "blade_kernels",
    "blade_pipelines": ROOT / "pipelines" / "blade_pipelines",
}

# The only files that look upward, always inside a function, so that nothing is imported before it is asked for.
UPWARD = {"blade/pipelines.py": {"blade_pipelines"}}


def run_python(code):
    """Run code in a fresh interpreter at the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def imports(path):
    """Yield (module, whether it is imported when the file is) for every import statement of a file."""

    def visit(node, deferred):
        for child in ast.iter_child_nodes(node):
            inner = deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            # what stands under `if TYPE_CHECKING:` is never imported
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, not deferred) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level == 0:  # a relative import stays inside its package
                    yield child.module, not deferred
            else:
                yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def files():
    return [(package, path) for package, folder in SOURCES.items() for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("folder", ["kernels", "pipelines", "scripts", "tests"])
def test_no_folder_shadows_a_package(folder):
    """An importable `kernels` at the root would stand in for Hugging Face's package of that name."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_transformers_diffusers_and_blade_import_together_from_the_root():
    result = run_python("import transformers, diffusers, blade; from diffusers import WanPipeline; print(WanPipeline)")
    assert result.returncode == 0, result.stderr
    assert "WanPipeline" in result.stdout


def test_imports_point_one_way():
    allowed = {
        "blade_kernels": {"blade_kernels"},
        "blade": {"blade_kernels", "blade"},
        "blade_pipelines": {"blade_kernels", "blade", "blade_pipelines"},
    }
    for package, path in files():
        name = path.relative_to(ROOT).as_posix()
        in_cli = name.startswith("blade/cli/")
        for module, at_import in imports(path):
            top = module.split(".")[0]
            if top not in SOURCES:
                continue
            if in_cli:
                continue  # the commands stand above everything
            assert not module.startswith("blade.cli"), f"{name} imports {module}"
            if top not in allowed[package]:
                assert top in UPWARD.get(name, ()), f"{name} imports {module}"
                assert not at_import, f"{name} imports {module} when it is imported itself"


def test_kernels_need_nothing_but_torch_and_triton():
    for package, path in files():
        if package == "blade_kernels":
            for module, _ in imports(path):
                top = module.split(".")[0]
                assert top in {"torch", "triton", "blade_kernels", "__future__"} | sys.stdlib_module_names, (
                    f"{path.name} imports {module}"
                )


def test_importing_blade_imports_nothing_heavy():
    result = run_python(
        "import sys, blade; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules);"
        "blade.BladeConfig; blade.TokenGrid; assert 'diffusers' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there():
    assert set(blade.__all__) == {
        "BladeConfig",
        "BlockMask",
        "TokenGrid",
        "apply_blade",
        "blade_summary",
        "block_sparse_attention",
        "load_student",
        "push_student",
        "remove_blade",
        "unload_student",
        "use_blade",
    }
    assert set(blade.__all__) <= set(dir(blade))
    for name in blade.__all__:
        assert getattr(blade, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = blade.nothing


def test_a_wheel_holds_exactly_the_three_packages(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.egg-info")
    for folder in ("blade", "kernels", "pipelines"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = [name for name in names if name.endswith("top_level.txt")]
        assert set(archive.read(top_level).decode().split()) == set(SOURCES)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(SOURCES)
    for package in SOURCES:
        assert f"{package}/py.typed" in names
