"""Strict JSON, and the types of fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from blade.common import reading
from blade.common.checks import shortened
from blade.common.fields import check_types, read_fields
from blade.common.reading import parse_json, read_json


@dataclass
class Inner:
    """A dataclass in another one."""

    width: int = 1


@dataclass
class Outer:
    """A dataclass with a field of every kind."""

    name: str = "a"
    count: int = 1
    share: float = 0.5
    is_on: bool = False
    kind: Literal["first", "second"] | None = None
    counts: tuple[int, ...] = ()
    size: tuple[int, float] = (1, 2.0)
    table: dict[str, float] | None = None
    inner: Inner | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": 3}, "`name` must be a string, got 3."),
        ({"name": None}, "`name` must be a string, got None."),
        ({"count": True}, "`count` must be an integer of at most 64 bits, got True."),
        ({"count": 1.0}, "`count` must be an integer of at most 64 bits, got 1.0."),
        ({"count": 10**5000}, "`count` must be an integer of at most 64 bits, got an integer of 16,610 bits."),
        ({"share": float("inf")}, "`share` must be a finite number, got inf."),
        ({"share": 10**400}, "`share` must be a finite number, got an integer of 1,329 bits."),
        ({"share": True}, "`share` must be a finite number, got True."),
        ({"is_on": 1}, "`is_on` must be True or False, got 1."),
        ({"kind": "frist"}, '`kind` must be one of "first", "second" or None, got \'frist\'; did you mean first?'),
        ({"kind": []}, '`kind` must be one of "first", "second" or None, got [].'),
        ({"counts": "abc"}, "`counts` must be a list of integers, got 'abc'."),
        (
            {"counts": [*range(94), "x"]},
            "`counts` must be a list of integers, got [0, 1, 2, 3, 4, 5, ...] (95 items).",
        ),
        ({"size": [1]}, "`size` must be a list of an integer of at most 64 bits and a finite number, got [1]."),
        ({"table": {"a": "b"}}, "`table` must be a JSON object of finite numbers or None, got {'a': 'b'}."),
        ({"inner": {}}, "`inner` must be an Inner or None, got {}."),
        ({"inner": Inner(width="x")}, "`inner.width` must be an integer of at most 64 bits, got 'x'."),
    ],
)
def test_a_field_of_another_type_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_types(Outer(**values))
    assert str(raised.value) == message


def test_fields_of_the_right_types_are_taken() -> None:
    check_types(Outer())
    check_types(
        Outer(share=1, kind="second", counts=[1, 2], size=[1, 2], table={"a": 1}, inner=Inner(), anything=object())
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "`inner` must be a JSON object, got []."),
        ({"widht": 3}, "`inner` must hold fields of width, got 'widht'; did you mean width?"),
        ({"q": 3}, "`inner` must hold fields of width, got 'q'."),
    ],
)
def test_an_object_of_unknown_fields_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        read_fields(Inner, values, "inner")
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ('{"a": 1, "a": 2}', "an object has the key 'a' twice"),
        ("1" * 5000, "Exceeds the limit"),
        ('"\\ud800"', "surrogates not allowed"),
        (b"\xff\xfe", "can't decode byte"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json_is_one_line(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^`list` cannot be read as JSON: ") as raised:
        parse_json(text, "`list`")
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_is_read_up_to_a_size_and_must_hold_an_object(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    path.write_text('﻿{"a": [1]}', encoding="utf-8")
    assert read_json(path, "`a`") == {"a": [1]}
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"^`a` must hold a JSON object, got \[1\].$"):
        read_json(path, "`a`")
    with pytest.raises(ValueError, match=r"^`a` cannot be read as JSON: .*Is a directory"):
        read_json(tmp_path, "`a`")
    monkeypatch.setattr(reading, "MOST_BYTES", 2**20)
    path.write_bytes(b" " * 2**20 + b"{}")
    with pytest.raises(ValueError, match=r"^`a` cannot be read as JSON: it has more than 1 MiB\.$"):
        read_json(path, "`a`")


def test_long_values_are_shortened_to_a_line() -> None:
    assert shortened(list(range(94))) == "[0, 1, 2, 3, 4, 5, ...] (94 items)"
    assert shortened("x" * 1000) == f"'{'x' * 47}...{'x' * 48}'"
    assert shortened({"a": 1}) == "{'a': 1}" and shortened("a\nb") == r"'a\nb'"
