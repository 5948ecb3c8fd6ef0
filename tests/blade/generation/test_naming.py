"""Names of videos: unique for what was asked for, skipped only for the same, and never an input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from blade.common.files import OutputError
from blade.common.locks import InUseError, file_locked
from blade.generation import outputs
from blade.generation.inputs import input_state
from blade.generation.naming import default_output, settings_hash
from blade.generation.outputs import generate_files, generate_list
from blade.generation.plan import resolve_without_weights
from blade.generation.request import GenerationRequest
from blade.media.video import encode_mp4, read_mp4

PROMPT = "a red ball moving right"
LONG = "a red ball moving right and a blue square moving left in front of a striped background with "
TINY = {
    "height": 64,
    "width": 64,
    "frames": 5,
    "steps": 1,
    "device": "cpu",
    "attention": "dense",
    "guidance_scale": 1.0,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(saved_tiny_pipeline: Path):
    """Return a function that makes a request which takes a fraction of a second."""

    def make(**changes) -> GenerationRequest:
        return GenerationRequest(**{"prompt": PROMPT, "model": str(saved_tiny_pipeline), **TINY, **changes})

    return make


def names(pattern: str = "*.mp4", folder: str = "outputs") -> list[str]:
    return sorted(path.name for path in Path(folder).glob(pattern))


def test_the_default_output_names_prompt_and_seed() -> None:
    assert default_output(GenerationRequest(prompt=PROMPT)) == Path("outputs/a-red-ball-moving-right-0.mp4")
    other = default_output(GenerationRequest(prompt="A red ball, moving  right!", seed=4))
    assert other.name.startswith("a-red-ball-moving-right-") and other.name.endswith("-4.mp4")
    assert len(other.name) == len("a-red-ball-moving-right-012345-4.mp4")
    assert default_output(GenerationRequest(prompt="?")).name.startswith("video-")


@pytest.mark.parametrize("prompts", [(LONG + "stars", LONG + "dots"), ("hello", "Hello!")], ids=["cut", "capitals"])
def test_two_prompts_of_a_list_make_two_videos(tiny, prompts) -> None:
    report = generate_list(tiny(), prompts)
    assert (len(report.made), len(report.skipped)) == (2, 0) and len(names()) == 2
    assert [json.loads(made.record_path.read_text())["prompt"] for made in report.made] == list(prompts)
    again = generate_list(tiny(), prompts)
    assert (len(again.made), len(again.skipped)) == (0, 2)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"steps": 2}, "steps"), ({"height": 80}, "height"), ({"attention": "asa", "sparsity": 0.5}, "sparsity")],
)
def test_a_video_of_other_settings_stays(tiny, changes, field, caplog) -> None:
    first = generate_files(tiny())
    before = first.video_path.read_bytes(), first.record_path.read_bytes()
    caplog.set_level("INFO", logger="blade")
    other = generate_files(tiny(**changes))
    assert other.video_path != first.video_path
    assert (first.video_path.read_bytes(), first.record_path.read_bytes()) == before
    assert "a-red-ball-moving-right-0.mp4 stays: it was made with another `" in caplog.text
    assert generate_files(tiny(**changes)).video_path == other.video_path  # the same video again
    assert generate_files(tiny()).video_path == first.video_path == Path("outputs/a-red-ball-moving-right-0.mp4")
    assert len(names()) == 2


def test_a_list_with_other_settings_is_made_anew_beside_the_old_videos(tiny, monkeypatch) -> None:
    prompts = [PROMPT, "a blue ball moving up"]
    generate_list(tiny(), prompts)
    before = {name: Path("outputs", name).read_bytes() for name in names()}
    other = generate_list(tiny(steps=2), prompts)
    assert (len(other.made), len(other.skipped)) == (2, 0) and len(names()) == 4
    assert {name: Path("outputs", name).read_bytes() for name in before} == before
    monkeypatch.setattr(outputs, "lead", None)  # nothing is loaded for what is there
    for request in (tiny(), tiny(steps=2)):
        assert len(generate_list(request, prompts).skipped) == 2


def test_where_a_video_was_made_makes_no_difference(tiny) -> None:
    report = generate_list(tiny(), [PROMPT])
    path = report.made[0].record_path
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "cuda:1", "offload": "model"}))
    assert len(generate_list(tiny(), [PROMPT]).skipped) == 1


@pytest.mark.parametrize(
    "record", [None, "", "[]", '{"a": 1}', "[" * 100_000], ids=["no", "empty", "list", "other", "deep"]
)
def test_a_video_without_a_record_stays(tiny, record) -> None:
    Path("outputs").mkdir()
    foreign = Path("outputs/a-red-ball-moving-right-0.mp4")
    foreign.write_bytes(b"somebody's")
    if record is not None:
        foreign.with_suffix(".json").write_text(record)
    report = generate_list(tiny(), [PROMPT])
    assert len(report.made) == 1 and foreign.read_bytes() == b"somebody's" and len(names()) == 2
    if record is not None:
        assert foreign.with_suffix(".json").read_text() == record


@pytest.mark.parametrize("moved", [1, 2])
def test_a_kill_between_the_files_of_a_video_is_mended_in_its_place(tiny, monkeypatch, moved) -> None:
    request = tiny(attention="asa", sparsity=0.5, dense_steps=0, dense_layers=())
    write = outputs.write_files
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "write_files", lambda files: write(dict([*files.items()][:moved])))
        generate_list(request, [PROMPT], compare=True)
    assert names("a*-0.mp4") == []
    report = generate_list(request, [PROMPT], compare=True)
    assert names("*.*") == [f"a-red-ball-moving-right-0{end}" for end in ("-compare.mp4", ".json", ".mp4")]
    assert len(report.made) == 1 and len(generate_list(request, [PROMPT], compare=True).skipped) == 1


def test_a_video_that_is_not_that_of_its_record_stays(tiny, caplog) -> None:
    (made,) = generate_list(tiny(), [PROMPT]).made
    caplog.set_level("INFO", logger="blade")
    other = encode_mp4(torch.zeros(5, 3, 64, 64), 8)
    made.video_path.write_bytes(other)
    report = generate_list(tiny(), [PROMPT])
    assert len(report.made) == 1 and len(names()) == 2 and made.video_path.read_bytes() == other
    assert "it is not the video of its record" in caplog.text


def test_a_record_of_an_earlier_version_counts(tiny) -> None:
    (made,) = generate_list(tiny(), [PROMPT]).made
    record = json.loads(made.record_path.read_text())
    for name in ("inputs", "added", "last_image", "video_sha256"):
        del record[name]
    made.record_path.write_text(json.dumps(record))
    assert len(generate_list(tiny(), [PROMPT]).skipped) == 1


def test_a_record_from_before_eight_bits_is_of_full_precision(tiny) -> None:
    sparse = {"attention": "asa", "sparsity": 0.5, "dense_steps": 0, "dense_layers": ()}
    (made,) = generate_list(tiny(**sparse), [PROMPT]).made
    record = json.loads(made.record_path.read_text())
    assert record.pop("precision") == record["blade_config"].pop("precision") == "full"
    made.record_path.write_text(json.dumps(record))
    assert len(generate_list(tiny(**sparse), [PROMPT]).skipped) == 1
    (other,) = generate_list(tiny(**sparse, precision="int8"), [PROMPT]).made
    assert other.record["precision"] == other.record["blade_config"]["precision"] == "int8"
    assert other.video_path.read_bytes() != made.video_path.read_bytes()


def test_a_list_makes_the_comparison_that_is_missing(tiny) -> None:
    request = tiny(attention="asa", sparsity=0.5, dense_steps=0, dense_layers=())
    generate_list(request, [PROMPT])
    (made,) = generate_list(request, [PROMPT], compare=True).made
    assert made.comparison_path is not None and made.comparison_path.is_file()
    assert len(generate_list(request, [PROMPT], compare=True).skipped) == 1


def test_repeated_prompts_are_made_once_and_said(tiny, caplog) -> None:
    caplog.set_level("INFO", logger="blade")
    report = generate_list(tiny(), [PROMPT, PROMPT, PROMPT])
    assert len(report.made) == 1 and not report.skipped
    assert "`prompts`: 2 of 3 repeat another one and count once" in caplog.text


def test_a_replaced_input_makes_another_video(saved_tiny_ti2v: Path) -> None:
    image = Path("first.png")
    request = GenerationRequest(
        prompt=PROMPT, model=str(saved_tiny_ti2v), image=str(image), **{**TINY, "height": 64, "width": 64}
    )
    Image.new("RGB", (64, 64), "red").save(image)
    assert len(generate_list(request, [PROMPT]).made) == 1
    assert len(generate_list(request, [PROMPT]).skipped) == 1
    Image.new("RGB", (64, 64), "blue").save(image)
    os.utime(image, (1, 1))
    report = generate_list(request, [PROMPT])
    assert len(report.made) == 1 and len(names()) == 2


def test_a_default_output_is_no_input(tiny) -> None:
    """A record's own video, made again without a path, stands beside it."""
    first = generate_files(tiny())
    before = first.record_path.read_bytes()
    again = generate_files(tiny(), inputs={first.record_path: "from_json"})
    assert again.video_path != first.video_path and first.record_path.read_bytes() == before
    # a video with the record of this very request, as what is to be changed
    again = generate_files(tiny(), inputs={Path("outputs/../outputs/a-red-ball-moving-right-0.mp4"): "video"})
    assert again.video_path != first.video_path


def test_an_input_is_refused_as_output_before_anything_is_loaded(saved_tiny_pipeline, tiny, monkeypatch) -> None:
    monkeypatch.setattr(outputs, "lead", None)
    video, record = Path("in.mp4"), Path("in.json")
    video.write_bytes(encode_mp4(torch.full((5, 3, 64, 64), 0.5), 16))
    record.write_text(json.dumps({"prompt": PROMPT, "seed": 0, "steps": 1}))
    Path("link.mp4").symlink_to(video)
    os.link(video, "hard.mp4")
    for output in ("in.mp4", "link.mp4", "hard.mp4", "../" + Path.cwd().name + "/in.mp4"):
        with pytest.raises(ValueError, match=r"must not replace an input, got .*, which is `video` in.mp4"):
            generate_files(tiny(video="in.mp4"), output)
    with pytest.raises(ValueError, match=r"must not replace an input, got in\.json, which is `from_json` in\.json"):
        generate_files(tiny(), "in.mp4", inputs={record: "from_json"})
    shutil.copy(video, "out-compare.mp4")
    with pytest.raises(ValueError, match=r"got out-compare\.mp4, which is `video`"):
        generate_files(tiny(video="out-compare.mp4"), "out.mp4", compare=True)
    lora = Path("lora.mp4")
    lora.write_bytes(b"lora")
    with pytest.raises(ValueError, match=r"got lora\.mp4, which is `loras`"):
        generate_files(tiny(loras=("lora.mp4=0.5",)), lora)
    with pytest.raises(ValueError, match=r"got lora\.mp4, which is `loras`"):
        generate_files(tiny(loras=("other:lora.mp4=0.5",)), lora)


def test_a_file_that_is_no_record_is_not_replaced_by_one(tiny, monkeypatch) -> None:
    monkeypatch.setattr(outputs, "lead", None)
    Path("blade_config.json").write_text('{"attention": "asa"}')
    with pytest.raises(ValueError, match=r"`output` blade_config.mp4 would replace blade_config.json, which is not a"):
        generate_files(tiny(), "blade_config.mp4")
    assert Path("blade_config.json").read_text() == '{"attention": "asa"}'


def test_a_given_output_is_replaced(tiny) -> None:
    generate_files(tiny(), "video.mp4")
    generate_files(tiny(seed=1), "video.mp4")
    assert json.loads(Path("video.json").read_text())["seed"] == 1
    assert read_mp4("video.mp4").shape == (5, 3, 64, 64)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_long_prompt_of_wide_characters_has_a_file(tiny, seed) -> None:
    request = tiny(prompt="一只红色的小球向右移动" * 30, seed=seed, attention="asa", sparsity=0.5, dense_steps=0)
    report = generate_files(request, compare=True)
    assert all(path.is_file() for path in (report.video_path, report.record_path, report.comparison_path))
    other = generate_files(tiny(prompt=request.prompt, seed=seed), compare=False)
    for path in (*report.video_path.parent.iterdir(), other.video_path):
        assert len(path.name.encode()) + 16 <= 255


def test_a_name_that_is_too_long_is_refused_before_anything_is_loaded(tiny, monkeypatch) -> None:
    monkeypatch.setattr(outputs, "lead", None)
    with pytest.raises(OutputError, match=r"`output` a+\.json cannot be written: File name too long"):
        generate_files(tiny(), "a" * 252 + ".mp4")
    with pytest.raises(OutputError, match=r"a+-compare\.mp4 cannot be written: File name too long"):
        generate_files(tiny(attention=None), "a" * 245 + ".mp4", compare=True)


def test_a_folder_in_the_records_place_is_refused_before_anything_is_loaded(tiny, monkeypatch) -> None:
    monkeypatch.setattr(outputs, "lead", None)
    Path("video.json").mkdir()
    with pytest.raises(OSError, match=r"`output` video.json is a folder"):
        generate_files(tiny(), "video.mp4")


def test_the_same_video_is_made_by_one_process(tiny) -> None:
    first = generate_files(tiny())
    note = settings_hash(resolve_without_weights(tiny())[1])
    with file_locked(first.video_path, note=note), pytest.raises(InUseError, match="is being made by process"):
        generate_files(tiny())
    with file_locked(first.video_path, note="another"):
        assert generate_files(tiny()).video_path != first.video_path
    with file_locked(Path("given.mp4")), pytest.raises(InUseError, match=r"given\.mp4 is being made by process"):
        generate_files(tiny(), "given.mp4")
    assert not names(".blade-*") and not names(".blade-*", ".")


def test_what_is_being_written_beside_a_student_does_not_count(tmp_path) -> None:
    weights = tmp_path / "student" / "pytorch_lora_weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    request = GenerationRequest(prompt=PROMPT, student=str(weights.parent))
    before = input_state(request)
    for other in (".tmp/pytorch_lora_weights.safetensors", "log.jsonl", "videos/a.json", "videos/a.mp4"):
        path = weights.parent / other
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (weights.parent / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert input_state(request) == before is not None
    weights.write_bytes(b"other weights")
    assert input_state(request) != before
    assert input_state(GenerationRequest(prompt=PROMPT)) is None
    assert input_state(GenerationRequest(prompt=PROMPT, image="https://nowhere/" + "long" * 100)) is None
