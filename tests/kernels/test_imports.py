"""The kernels stand alone: they import nothing of blade, and nothing of its model families."""

import ast
import subprocess
import sys
from pathlib import Path

import blade_kernels

FOLDER = Path(blade_kernels.__file__).parent
ALLOWED = set(sys.stdlib_module_names) | {"torch", "triton", "blade_kernels"}
OF_ONE_FILE = {"cute_libraries.py": {"cudnn", "flash_attn"}}
"""Packages that single files import when they are first used."""


def imported(file):
    """Names of the modules that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return names


def test_sources_import_torch_and_themselves_alone():
    files = list(FOLDER.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        for name in imported(file):
            assert name.split(".")[0] in ALLOWED | OF_ONE_FILE.get(file.name, set()), f"{file.name} imports {name}"


def test_specifications_depend_on_no_implementation():
    """The reference for the others shares no code with them, apart from its argument types."""
    files = list(FOLDER.rglob("naive.py"))
    assert {file.parent.name for file in files} == {"block_sparse", "block_selection", "qk_norm_rope"}
    arguments = {"blade_kernels.block_mask", "blade_kernels.block_sparse.pooled"}
    for file in files:
        assert {name for name in imported(file) if name.startswith("blade_kernels")} <= arguments, file.parent.name


def test_importing_loads_nothing_of_blade_and_no_compiler():
    code = (
        "import sys, blade_kernels.block_sparse, blade_kernels.block_selection, blade_kernels.qk_norm_rope\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('blade', 'blade_pipelines', 'diffusers')])\n"
        "print([name for name in ('torch._inductor.compile_fx', 'cutlass', 'cudnn') if name in sys.modules])\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["[]", "[]"]
