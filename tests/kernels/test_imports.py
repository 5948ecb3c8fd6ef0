"""The kernels stand alone: they import nothing of blade, and nothing of its model families."""

import ast
import subprocess
import sys
from pathlib import Path

import blade_kernels

FOLDER = Path(blade_kernels.__file__).parent
ALLOWED = set(sys.stdlib_module_names) | {"torch", "triton", "blade_kernels"}


def test_sources_import_torch_and_themselves_alone():
    files = list(FOLDER.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "blade_kernels"] if not node.level else []
            for name in names:
                assert name.split(".")[0] in ALLOWED, f"{file.name} imports {name}"


def test_importing_loads_nothing_of_blade_and_no_compiler():
    code = (
        "import sys, blade_kernels.block_sparse, blade_kernels.block_selection\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('blade', 'blade_pipelines', 'diffusers')])\n"
        "print('torch._inductor.compile_fx' in sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["[]", "False"]
