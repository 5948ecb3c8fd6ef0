"""The videos of a list of prompts: their names, paths and requests, whoever makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blade.generation.inputs import input_paths
from blade.generation.naming import (
    LOCAL_FILES,
    VideoFiles,
    default_output,
    is_made,
    possible_paths,
    record_path,
)
from blade.generation.prompts import without_repetitions
from blade.generation.request import GenerationRequest, ResolvedRequest, refused_prompts

VideoKey = tuple[str, int]
"""Prompt and seed."""


@dataclass(frozen=True, kw_only=True)
class VideoList:
    """The videos of a list of prompts with the same settings."""

    request: GenerationRequest
    """The request of the first."""
    paths: Mapping[VideoKey, Path]
    """By prompt and seed, the path that the video has unless one of other settings is there."""
    names: Mapping[VideoKey, str]
    """By prompt and seed, the prompt, with its seed where there are several."""
    failed: dict[str, str]
    """By prompt, why the model cannot draw it, as far as that is known beforehand."""
    inputs: Mapping[Path, str]
    """Files that are read and must not be replaced, with the options that name them."""
    compare: bool
    """True if dense videos are made as well."""
    files: VideoFiles = LOCAL_FILES
    """What is where the videos go."""

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        prompts: Sequence[str],
        folder: Path,
        *,
        seeds: Sequence[int] | None,
        compare: bool,
        inputs: Mapping[Path, str] | None,
        files: VideoFiles = LOCAL_FILES,
    ) -> VideoList:
        """Return the videos of a list; see `blade.generation.outputs.generate_list` for the arguments.

        Raises:
            ValueError: for a folder that has the name of a video.
        """
        failed = refused_prompts(request, prompts)
        drawn = [prompt for prompt in prompts if prompt not in failed]
        if drawn and folder.suffix.lower() == ".mp4":
            raise ValueError(f"`output` must be a folder where several videos are made, got {folder}.")
        several = (request.seed,) if seeds is None else seeds
        keys = [(prompt, seed) for prompt in without_repetitions(drawn) for seed in several]
        return cls(
            request=replace(request, prompt=drawn[0]) if drawn else request,
            paths={
                (prompt, seed): folder / default_output(replace(request, prompt=prompt, seed=seed)).name
                for prompt, seed in keys
            },
            names={key: key[0] if len(several) == 1 else f"{key[0]}, seed {key[1]}" for key in keys},
            failed=failed,
            inputs={**(inputs or {}), **input_paths(request)},
            compare=compare,
            files=files,
        )

    def may_be_there(self) -> bool:
        """Return whether all videos have records, whatever is in them."""
        return all(self.files.has(record_path(path)) for path in self.paths.values())

    def there(self, resolved: ResolvedRequest) -> tuple[Path, ...]:
        """Return the paths of all videos if all are there with this request's settings, or none of them."""
        own = [(path, replace(resolved, prompt=prompt, seed=seed)) for (prompt, seed), path in self.paths.items()]
        there = tuple(next(possible_paths(path, request, self.inputs, self.files)) for path, request in own)
        made = (
            is_made(path, request, self.compare, self.files) for path, (_, request) in zip(there, own, strict=True)
        )
        return there if all(made) else ()
