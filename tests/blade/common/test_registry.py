from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from blade.common import registry
from blade.common.registry import Registry


@dataclass(frozen=True)
class Fruit:
    """Something with a name."""

    name: str
    weight: float = 1.0


APPLE, PEAR = Fruit("apple"), Fruit("pear")
BASKET = [Fruit("quince"), Fruit("medlar")]
CLASHING = [Fruit("apple", weight=2.0)]


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group="fruits")


@pytest.fixture
def installed(monkeypatch):
    """Entry points that seem installed, and the groups that were asked for."""
    entries, asked = [], []

    def entry_points(*, group):
        asked.append(group)
        return entries

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return entries, asked


def test_what_is_registered_comes_after_the_own(installed):
    fruits = Registry(Fruit, (PEAR, APPLE), group="fruits")
    plum = fruits.register(Fruit("plum"))
    assert list(fruits.declared) == ["pear", "apple", "plum"] and fruits.declared["plum"] is plum
    assert fruits.select(lambda fruit: "p" in fruit.name[:1]) == (PEAR, plum)
    with pytest.raises(TypeError):
        fruits.declared["fig"] = Fruit("fig")


def test_names_are_unique_and_classes_right(installed):
    fruits = Registry(Fruit, (APPLE,), group="fruits")
    assert fruits.register(Fruit("apple")) == APPLE, "the same declaration twice, as of a module imported again"
    with pytest.raises(ValueError, match="`name` must be new among declarations of Fruit, got 'apple' again"):
        fruits.register(Fruit("apple", weight=2.0))
    assert fruits.declared == {"apple": APPLE}
    with pytest.raises(TypeError, match="`item` must be a Fruit, got 'pear'"):
        fruits.register("pear")


def test_entry_points_are_loaded_once_and_at_the_first_look(installed):
    entries, asked = installed
    fruits = Registry(Fruit, (APPLE,), group="fruits")
    entries.append(entry("basket", f"{__name__}:BASKET"))
    assert not asked
    assert list(fruits.declared) == list(fruits.declared) == ["apple", "quince", "medlar"]
    assert asked == ["fruits"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:BASKET", "ModuleNotFoundError"),
        (f"{__name__}:CLASHING", "got 'apple' again"),
        (f"{__name__}:APPLE", "TypeError"),
    ],
)
def test_a_broken_entry_point_is_reported_and_stops_no_other(installed, value, message):
    entries, _ = installed
    entries += [entry("broken", value), entry("basket", f"{__name__}:BASKET")]
    fruits = Registry(Fruit, (APPLE,), group="fruits")
    with pytest.warns(UserWarning, match="The entry point `broken` .* of `fruits` cannot be loaded: ") as warned:
        assert list(fruits.declared) == ["apple", "quince", "medlar"]
    assert message in str(warned[0].message)
