"""What a search could have found, made up: heads with habits, and errors that fall with density."""

from dataclasses import replace

import numpy as np

from blade.profiling.report import Candidate, ReportData

KINDS = ("diagonal", "multi-diagonal", "window", "vertical")
DENSITIES = (0.1, 0.2, 0.35, 0.55)
PROMPTS = (
    "a small striped red ball moving right fast",
    "a blue square moving up over a checkered background",
    'she said "</script><script>alert(1)</script>" & <b>left</b>',
    "ein grüner Würfel, der über die Straße läuft — 猫",
)


def report_example(
    *,
    layers: int = 6,
    heads: int = 3,
    steps: int = 50,
    group_steps: int = 5,
    parts: int = 4,
    frames: int = 9,
    places: int = 4,
    kept_candidates: tuple[int, ...] = tuple(range(19)),
    seed: int = 0,
    **changes: object,
) -> ReportData:
    """Make a report's data.

    Args:
        layers: of the model.
        heads: of a layer.
        steps: of a run.
        group_steps: steps with one assignment.
        parts: of the run, with maps of their own.
        frames: of the patches.
        places: in a frame; there are frames * places patches along a map.
        kept_candidates: of the 19.
        seed: for all that is drawn.
        changes: fields that are to be otherwise.
    """
    rng = np.random.default_rng(seed)
    cells, groups = frames * places, -(-steps // group_steps)
    found = [("full", "full", 1.0), ("skip", "skip", 0.0)]
    found += [(_name(kind, density), kind, density) for kind in KINDS for density in DENSITIES] + [("asa", "asa", 0.3)]
    everything = [Candidate(name=name, kind=kind, density=x, cost=0.05 + 0.95 * x) for name, kind, x in found]
    candidates = tuple(everything[number] for number in kept_candidates)
    weights = {kind: _shape(kind, frames, places) for kind in KINDS}
    masks = np.stack([_mask(candidate, weights, cells) for candidate in candidates])

    habits = rng.choice(len(KINDS), (layers, heads), p=(0.3, 0.25, 0.25, 0.2))
    focus = rng.gamma(2.0, 1.0, (layers, heads)) * np.linspace(1.6, 0.6, layers)[:, None]  # how strong a habit is
    columns = rng.random((layers, heads, cells)) ** 6
    assignment = np.zeros((groups, layers, heads), dtype=np.int64)
    for group in range(groups):
        need = rng.gamma(3.0, 0.06, (layers, heads)) * (1.4 - 0.8 * group / groups)
        for place in np.ndindex(layers, heads):
            kind = KINDS[habits[place]] if focus[place] > 0.5 else rng.choice(["full", "asa"])
            kind = "skip" if need[place] < 0.05 else kind
            fitting = [number for number, one in enumerate(candidates) if one.kind == kind]
            assignment[group][place] = min(fitting, key=lambda n: abs(candidates[n].density - need[place]))
    density = np.array([candidate.density for candidate in candidates])[assignment]
    noise = rng.lognormal(0.0, 0.6, assignment.shape)
    stripes = np.zeros((groups, layers, heads, cells), dtype=np.uint8)
    for place in np.ndindex(groups, layers, heads):
        count = max(1, round(density[place] * cells))
        stripes[place][np.argsort(-columns[place[1:]])[:count]] = 255

    progress = np.linspace(0, 1, steps)
    by_layer = rng.random((len(KINDS), layers, 1))
    explained = 0.35 + 0.3 * by_layer + 0.2 * progress * (rng.random((len(KINDS), layers, 1)) - 0.3)
    explained = np.clip(explained + 0.015 * rng.standard_normal((len(KINDS), layers, steps)), 0, 1)
    best = np.clip(0.75 + 0.15 * progress + 0.08 * rng.random((layers, 1)), 0, 0.99)
    recall = np.stack([best * np.clip(0.9 + 0.08 * rng.random((layers, steps)), 0, 1), best], axis=-1)
    points = np.linspace(0.05, 1.0, 24)
    curve = np.stack([points, 0.25 * np.exp(-6 * points) * (1 - points) ** 0.5], axis=-1)
    disagreement = np.round(rng.beta(1, 3, (layers, heads)) * len(PROMPTS)) / len(PROMPTS)
    data = ReportData(
        title="Head patterns of a video model",
        command="blade-profile --model shapes --density 0.35 --prompts prompts.txt --output runs/profile",
        date="2026-03-14",
        model="Wan-like model of moving shapes",
        machine={"processor": "two cores", "memory": "24 GiB"},
        versions={"torch": "2.13.0", "diffusers": "0.42.1"},
        video="33 frames of 96x96",
        grid="9 x 12 x 12 tokens",
        block_size=32,
        token_order="raster",
        steps=steps,
        group_starts=tuple(range(0, steps, group_steps)),
        prompts=PROMPTS,
        branches=2,
        budget="target density 0.35",
        notes=("The error of the chosen patterns is at most 0.4 % above the smallest that the budget allows.",),
        candidates=candidates,
        assignment=assignment,
        head_error=(0.2 * np.exp(-5 * density) * (1 - density) * noise).astype(np.float32),
        explained=explained.astype(np.float32),
        explained_kinds=KINDS,
        maps=_maps(rng, weights, habits, focus, columns, parts),
        masks=masks,
        stripes=stripes,
        curve=curve.astype(np.float32),
        published_curve=(curve[::3] * [1, 1.7] + [0, 0.002]).astype(np.float32),
        chosen=(0.347, 0.0263),
        verified={"density": 0.347, "error": 0.031, "psnr_db": 24.6},
        recall=recall.astype(np.float32),
        prompt_disagreement=disagreement.astype(np.float32),
        prompt_regret=(disagreement * rng.beta(1, 8, (layers, heads))).astype(np.float32),
        orders=("raster", "token-major", "hilbert", "bricks(2,4,4)"),
        order_densities=tuple(
            (one.name, tuple(np.clip(one.density * rng.uniform(0.9, 2.2, 4), 0, 1)))
            for one in candidates
            if one.kind not in ("full", "skip", "asa")
        ),
    )
    return replace(data, **changes)


def _name(kind: str, density: float) -> str:
    if kind == "vertical":
        return f"vertical, {density:.0%}"
    if kind == "window":
        frames, places = round(9 * density**0.4), round(12 * density**0.4)
        return f"window, frame {frames}, row {places}, column {places}, in bricks(2,4,4) order"
    return f"{kind}, {round(4.5 * density, 3)} frames"


def _shape(kind: str, frames: int, places: int) -> np.ndarray:
    """(cells, cells), how near a pair of patches is by a kind's measure: 0 for the nearest."""
    frame, place = np.divmod(np.arange(frames * places), places)
    apart = np.abs(frame[:, None] - frame), np.abs(place[:, None] - place)
    if kind == "diagonal":
        return np.abs(np.subtract.outer(np.arange(frames * places), np.arange(frames * places))).astype(float)
    if kind == "multi-diagonal":
        return apart[1] * frames + 0.3 * apart[0]
    return apart[0] + apart[1] * 1.5 if kind == "window" else np.zeros((frames * places,) * 2)


def _mask(candidate: Candidate, weights: dict[str, np.ndarray], cells: int) -> np.ndarray:
    if candidate.kind in ("full", "skip", "asa"):
        return np.full((cells, cells), 255 * (candidate.kind == "full"), dtype=np.uint8)
    if candidate.kind == "vertical":
        every = max(1, round(1 / candidate.density))
        return np.broadcast_to(255 * (np.arange(cells) % every == every // 2), (cells, cells)).astype(np.uint8)
    distance = weights[candidate.kind]
    return np.where(distance <= np.quantile(distance, candidate.density), 255, 0).astype(np.uint8)


def _maps(rng, weights, habits, focus, columns, parts) -> np.ndarray:
    """(parts, layers, heads, cells, cells) uint8."""
    (layers, heads), cells = habits.shape, columns.shape[-1]
    maps = np.zeros((parts, layers, heads, cells, cells), dtype=np.uint8)
    for part, layer, head in np.ndindex(parts, layers, heads):
        kind = KINDS[habits[layer, head]]
        logits = -focus[layer, head] * (0.6 + 0.4 * part / parts) * weights[kind] / 2
        if kind == "vertical":
            logits = 4 * focus[layer, head] * columns[layer, head] + logits
        weight = np.exp(logits + 0.25 * rng.standard_normal((cells, cells)))
        weight /= weight.sum(-1, keepdims=True)
        maps[part, layer, head] = np.rint(255 * np.sqrt(weight / weight.max()))
    return maps
