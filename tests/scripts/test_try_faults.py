"""The faults that commands meet: some at every check, all by hand; and that what they look for is found."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType, ModuleType]]:
    """The modules of the campaign, of what it breaks, and of what it damages."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import fault_fuzz
        import fault_work
        import try_faults

        yield try_faults, fault_work, fault_fuzz
    finally:
        sys.path.remove(str(SCRIPTS))


def try_them(script: ModuleType, capsys: pytest.CaptureFixture[str], *counts: int) -> None:
    """Run the campaign, and check that it broke things and found nothing."""
    with pytest.raises(script.typer.Exit) as ended:
        script.main(*counts)
    shown = capsys.readouterr().out
    assert ended.value.exit_code == 0, shown
    header, _, *rows = (line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("|"))
    names = ("kill", "full disk", "pair", "damaged file")
    assert [(row[0], int(row[1])) for row in rows] == list(zip(names, counts, strict=True))
    assert all(int(row[header.index("ended by it")]) > 0 for row in rows[:3]), shown


@pytest.mark.slow
def test_a_sample_of_faults_leaves_nothing_wrong(scripts, capsys) -> None:
    try_them(scripts[0], capsys, 6, 4, 4, 300)


@pytest.mark.long
def test_all_faults_leave_nothing_wrong(scripts, capsys) -> None:
    try_them(scripts[0], capsys, 60, 32, 20, 3000)


def test_faults_would_be_found(scripts, tmp_path: Path) -> None:
    _, work, _ = scripts
    (tmp_path / "a.json").write_text('{"a": ')
    (tmp_path / "b.mp4").write_bytes(b"\0" * 40)
    (tmp_path / "c.safetensors").write_bytes(b"\1\0\0")
    (tmp_path / ".d.json.4.tmp").write_text("{")
    assert [name.partition(":")[0] for name in work.half_written(tmp_path)] == ["a.json", "b.mp4", "c.safetensors"]
    assert work.leftovers(tmp_path) == [".d.json.4.tmp"]
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "record.json").write_text('{"prompt": "a cat", "seconds_denoising": 3}')
    expected = work.contents(tmp_path)
    (tmp_path / "record.json").write_text('{"prompt": "a cat", "seconds_denoising": 4}')
    assert work.differing(work.contents(tmp_path), expected) == []
    (tmp_path / "record.json").write_text('{"prompt": "a dog", "seconds_denoising": 3}')
    assert work.differing(work.contents(tmp_path), expected) == ["record.json"]


def test_what_is_accepted_in_silence_would_be_found(scripts, tmp_path: Path) -> None:
    _, _, fuzz = scripts
    path = tmp_path / "settings.json"
    path.write_text('{"steps": 8}')

    def fault(content: bytes, read, whole: bool = True):
        return fuzz.fault_of(fuzz.Readable("settings", path, read, lambda values: values, whole), content)

    assert fault(b'{"steps": 4}', fuzz.said) is None
    assert fault(b'{"steps": "4"}', lambda path: {"steps": 4})[0] == "silent acceptance"
    assert fault(b'{"steps": true}', lambda path: {"steps": 1})[0] == "silent acceptance"
    assert fault(b'{"steps": 4, "stesp": 8}', lambda path: {"steps": 4})[0] == "silent acceptance"
    assert fault(b'{"steps": 4, "stesp": 8}', lambda path: {"steps": 4}, whole=False) is None

    def read_with_a_warning(path: Path) -> dict[str, int]:
        fuzz.warnings.warn("`stesp` is unknown", stacklevel=1)
        return {"steps": 4}

    assert fault(b'{"steps": 4, "stesp": 8}', read_with_a_warning) is None

    def read_carelessly(path: Path) -> None:
        raise KeyError("steps")

    assert fault(b"{}", read_carelessly)[0] == "traceback"
    assert path.read_text() == '{"steps": 8}'
