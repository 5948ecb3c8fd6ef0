"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from blade.common.leftovers import files_in
from blade.models.choices import split_sources
from blade.models.source import BUNDLED, bundled_model_path
from blade.students.source import BUNDLED_STUDENTS, bundled_student_path


def model_fingerprint(model: str) -> str | None:
    """16 hexadecimal digits that change with the weights; None for a model that is not here.

    Args:
        model: a folder or file, or "FIRST:SECOND" of a student.
    """
    sources = split_sources(model) or (model,)
    if len(sources) > 1:
        parts = [model_fingerprint(source) for source in sources]
        return None if None in parts else hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()[:16]
    folder = Path(model).expanduser()
    if model == BUNDLED:
        folder = bundled_model_path()
    elif model in BUNDLED_STUDENTS.values():
        folder = bundled_student_path(model)
    if not folder.exists():
        return None
    digest = hashlib.sha256()
    for path in files_in(folder, "*.safetensors") if folder.is_dir() else [folder]:
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
