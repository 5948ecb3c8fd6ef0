from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from blade.common import declared
from blade.common.declared import declare, declare_installed


@dataclass(frozen=True)
class Fruit:
    """Something with a name."""

    name: str


APPLE = Fruit("apple")
BASKET = [Fruit("quince"), Fruit("medlar")]
CLASHING = Fruit("apple")
WORDS = ["plum"]


@pytest.fixture
def installed(monkeypatch):
    """Take the place of installed packages' entry points."""

    def install(**values: str) -> None:
        entries = {
            "fruits": [EntryPoint(name=name, value=value, group="fruits") for name, value in values.items()],
        }
        monkeypatch.setattr(declared, "entry_points", lambda group: entries[group])

    return install


def test_names_are_unique():
    table = {}
    assert declare(table, APPLE) is declare(table, APPLE) is APPLE
    with pytest.raises(ValueError, match="`name` must be new in the table, which has apple, got 'apple'"):
        declare(table, CLASHING)
    assert table == {"apple": APPLE}


def test_an_entry_point_names_one_item_or_several(installed):
    installed(basket=f"{__name__}:BASKET", apple=f"{__name__}:APPLE")
    table = {"pear": Fruit("pear")}
    declare_installed(table, Fruit, "fruits")
    assert list(table) == ["pear", "quince", "medlar", "apple"] and table["apple"] is APPLE


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:BASKET", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{__name__}:NOTHING", "AttributeError"),
        (f"{__name__}:CLASHING", "`name` must be new in the table, which has apple, got 'apple'"),
        (f"{__name__}:WORDS", "TypeError: it must name a Fruit or several, got 'plum'"),
        (f"{__name__}", "TypeError: it must name a Fruit or several, got <module"),
    ],
)
def test_a_broken_entry_point_is_warned_of_and_stops_no_other(installed, value, message):
    installed(broken=value, basket=f"{__name__}:BASKET")
    table = {"apple": APPLE}
    with pytest.warns(UserWarning, match="The entry point `broken` .* of `fruits` cannot be loaded: ") as warned:
        declare_installed(table, Fruit, "fruits")
    assert message in str(warned[0].message)
    assert list(table) == ["apple", "quince", "medlar"]
