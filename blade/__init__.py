"""Adaptive block-sparse attention and few-step students for Diffusers video pipelines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blade_kernels.block_mask import BlockMask
    from blade_kernels.block_sparse.api import block_sparse_attention

    from blade.attention.apply import apply_blade, remove_blade, use_blade
    from blade.attention.config import AdaptiveConfig, BladeConfig
    from blade.attention.pattern_table import PatternTable
    from blade.attention.summary import blade_summary
    from blade.generation.api import generate
    from blade.students.loading import load_student, push_student, unload_student
    from blade.students.scheduler import FewStepScheduler
    from blade.token_grid import TokenGrid

__version__ = "0.2.0"

__all__ = [
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
]

_HOMES = {
    "AdaptiveConfig": "blade.attention.config",
    "BladeConfig": "blade.attention.config",
    "BlockMask": "blade_kernels.block_mask",
    "FewStepScheduler": "blade.students.scheduler",
    "PatternTable": "blade.attention.pattern_table",
    "TokenGrid": "blade.token_grid",
    "apply_blade": "blade.attention.apply",
    "blade_summary": "blade.attention.summary",
    "block_sparse_attention": "blade_kernels.block_sparse.api",
    "generate": "blade.generation.api",
    "load_student": "blade.students.loading",
    "push_student": "blade.students.loading",
    "remove_blade": "blade.attention.apply",
    "unload_student": "blade.students.loading",
    "use_blade": "blade.attention.apply",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
