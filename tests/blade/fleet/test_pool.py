"""Order, retries and progress of tasks, with a stand-in for Ray and fake work."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from blade_kernels.crashes import DeviceCrashError
from fake_ray import FakeConnection, FakeJob, Lost, OutOfReach

from blade.common.terminal import logger
from blade.fleet.pool import (
    LEFT_OUT,
    RETRIES,
    STARTS,
    FleetError,
    FleetProgress,
    LostWorkerError,
    Pool,
    Task,
    in_order,
)
from blade.fleet.worker import portable


class Driver:
    """Takes down what comes of tasks."""

    def __init__(self, left_out: tuple[str, ...] = ()) -> None:
        self.left_out = left_out
        self.begun: list[str] = []
        self.results: dict[str, Any] = {}
        self.errors: dict[str, Exception] = {}

    def begin(self, task: Task) -> Any:
        if task.key in self.left_out:
            return LEFT_OUT
        self.begun.append(str(task.key))
        return task.key

    def done(self, task: Task, value: Any) -> None:
        assert task.key not in self.results
        self.results[str(task.key)] = value

    def failed(self, task: Task, error: Exception) -> None:
        assert task.key not in self.errors
        self.errors[str(task.key)] = error


def tasks(names: str, **options) -> list[Task]:
    return [Task(key=name, name=f"task {name}", **options) for name in names]


def run(
    given: list[Task],
    function: Callable[[str], Any] = str.upper,
    *,
    workers: int = 2,
    driver: Driver | None = None,
    loaded: Callable[[], None] = lambda: None,
    connection: FakeConnection | None = None,
) -> tuple[Driver, list[FleetProgress], FakeConnection]:
    """Do tasks, and return what came of them."""
    driver, progress = driver or Driver(), list[FleetProgress]()
    connection = connection or FakeConnection(workers)
    Pool(connection, FakeJob(function, loaded), progress.append).run(given, driver)
    return driver, progress, connection


def test_all_tasks_are_done_once() -> None:
    driver, progress, _ = run(tasks("abcdefgh"))
    assert driver.results == {name: name.upper() for name in "abcdefgh"} and not driver.errors
    assert driver.begun == list("abcdefgh")  # equal ones keep their order
    assert (progress[-1].done, progress[-1].total, progress[-1].seconds_left) == (8, 8, 0.0)


def test_long_tasks_begin_first() -> None:
    works = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 5.0, "e": 1.0}
    given = [Task(key=name, name=name, work=work) for name, work in works.items()]
    assert run(given)[0].begun == list("bdcae")


def test_tasks_with_the_same_weights_follow_each_other() -> None:
    values = [("a", 1, "x"), ("b", 9, "y"), ("c", 4, "x"), ("d", 2, "y"), ("e", 3, None)]
    given = [Task(key=key, name=key, work=work, group=group) for key, work, group in values]
    assert [task.key for task in in_order(given)] == ["b", "d", "c", "a", "e"]


def test_a_task_waits_for_the_one_that_it_needs() -> None:
    first, second = Task(key="dense", name="dense", work=1.0), Task(key="sparse", name="s", work=9.0, after="dense")
    other = Task(key="other", name="other", work=0.5, after="what is done already")
    assert run([second, first, other], workers=3)[0].begun == ["dense", "other", "sparse"]


def test_a_task_whose_needed_one_failed_is_done() -> None:
    def work(name: str) -> str:
        if name == "a":
            raise ValueError("no")
        return name

    driver, *_ = run([Task(key="a", name="a"), Task(key="b", name="b", after="a")], work)
    assert list(driver.results) == ["b"] and list(driver.errors) == ["a"]


@pytest.mark.parametrize("losses", [1, RETRIES, RETRIES + 1])
def test_a_lost_task_is_done_again_a_few_times(losses: int, caplog) -> None:
    attempts = Counter[str]()

    def work(name: str) -> str:
        attempts[name] += 1
        if name == "b" and attempts[name] <= losses:
            raise Lost
        return name

    with caplog.at_level(logging.WARNING):
        driver, progress, _ = run(tasks("abcd"), work)
    assert attempts["b"] == min(losses, RETRIES) + 1
    assert {name: attempts[name] for name in "acd"} == dict.fromkeys("acd", 1)
    again = [record for record in caplog.messages if "the worker of 'task b' on here was lost" in record]
    assert len(again) == min(losses, RETRIES)
    if losses <= RETRIES:
        assert set(driver.results) == set("abcd") and not driver.errors
        return
    assert set(driver.results) == set("acd")
    assert isinstance(driver.errors["b"], LostWorkerError)
    assert str(driver.errors["b"]) == "its worker was lost 4 times (ActorUnavailableError)."
    assert (progress[-1].done, progress[-1].failed) == (3, 1)


def test_a_lost_task_goes_to_the_next_free_worker() -> None:
    lost = []

    def work(name: str) -> str:
        if name == "a" and not lost:
            lost.append(name)
            raise Lost
        return name

    assert run(tasks("abcde"), work)[0].begun == ["a", "b", "a", "c", "d", "e"]


def test_an_ordinary_error_is_not_tried_again() -> None:
    def work(name: str) -> str:
        if name == "a":
            raise ValueError("`steps` must be less")
        return name

    driver, *_ = run(tasks("abc"), work)
    assert driver.begun == list("abc") and set(driver.results) == set("bc")
    assert type(driver.errors["a"]) is ValueError and str(driver.errors["a"]) == "`steps` must be less"


def test_a_crashed_gpu_takes_its_process_along() -> None:
    crashed = []

    def work(name: str) -> str:
        if name == "a" and not crashed:
            crashed.append(name)
            raise DeviceCrashError("prompt 'a' has crashed cuda: an illegal memory access")
        return name

    driver, _, connection = run(tasks("ab"), work)
    assert set(driver.results) == set("ab")
    assert connection.fake.killed == [False]  # to be started again


def test_what_is_left_out_needs_no_worker() -> None:
    driver, progress, _ = run(tasks("abc"), driver=Driver(left_out=("b",)))
    assert driver.begun == ["a", "c"] and progress[-1].left_out == 1
    assert str(progress[-1]).startswith("3/3 done")


def test_without_a_worker_that_cannot_load_the_others_go_on(caplog) -> None:
    loads = []

    def loaded() -> None:
        loads.append(1)
        if len(loads) == 1:
            raise ValueError("`model` x cannot be read")

    driver, progress, _ = run(tasks("abc"), loaded=loaded)
    assert set(driver.results) == set("abc") and progress[-1].workers == 1
    assert "a worker on here is left out: `model` x cannot be read" in caplog.text


def test_without_any_worker_the_reason_is_raised() -> None:
    def loaded() -> None:
        raise ValueError("`model` x cannot be read")

    with pytest.raises(ValueError, match="`model` x cannot be read"):
        run(tasks("abc"), loaded=loaded)


def test_workers_that_end_while_they_load_are_given_up() -> None:
    loads = []

    def loaded() -> None:
        loads.append(1)
        raise Lost

    with pytest.raises(FleetError, match="Workers end while they load the model, such as for want of memory"):
        run(tasks("abc"), workers=1, loaded=loaded)
    assert len(loads) == STARTS


def test_a_worker_that_was_out_of_reach_does_not_load_again() -> None:
    loads, lost = [], []

    def work(name: str) -> str:
        if not lost:
            lost.append(name)
            raise OutOfReach
        return name

    driver, *_ = run(tasks("ab"), work, workers=1, loaded=lambda: loads.append(1))
    assert set(driver.results) == set("ab") and len(loads) == 1


@pytest.mark.parametrize(("version", "said"), [("0.0.1", "with BLADE 0.0.1"), (None, "without BLADE")])
def test_a_machine_with_another_version_is_refused_by_name(version, said) -> None:
    connection = FakeConnection(2)
    connection.fake.version = version
    with pytest.raises(ValueError, match=f"`ray_address` has a machine {said}, here, and this has .* pip install"):
        run(tasks("ab"), connection=connection)


def test_warnings_of_workers_are_shown_once(caplog) -> None:
    def work(name: str) -> str:
        logger.warning("the prompt is long")
        if name == "b":
            raise ValueError("no")
        return name

    with caplog.at_level(logging.WARNING):
        run(tasks("abc"), work)
    shown = [record.getMessage() for record in caplog.records if record.module == "pool"]
    assert shown == ["the prompt is long"] and len(caplog.records) == 4


def test_a_pool_does_several_lists() -> None:
    loads = []
    connection = FakeConnection(1)
    pool = Pool(connection, FakeJob(str.upper, lambda: loads.append(1)))
    for names in ("ab", "cd"):
        driver = Driver()
        pool.run(tasks(names), driver)
        assert set(driver.results) == set(names)
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"done": 0, "workers": 0}, "0/24 done, workers load"),
        ({"done": 7, "per_minute": 8.25, "seconds_left": 200.0}, "7/24 done, 8.25 a minute, 3 min left, 2 workers"),
        (
            {"done": 7, "left_out": 3, "failed": 1, "per_minute": 120.0, "seconds_left": 6.5, "workers": 1},
            "10/24 done, 1 failed, 120 a minute, 6 s left, 1 worker",
        ),
    ],
)
def test_progress_is_one_line(values, text) -> None:
    common = {"failed": 0, "left_out": 0, "total": 24, "workers": 2, "per_minute": None, "seconds_left": None}
    assert str(FleetProgress(**{**common, **values})) == text


def test_time_left_follows_the_predicted_work(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("blade.fleet.pool.time.monotonic", lambda: clock[0])

    def work(name: str) -> str:
        clock[0] += {"a": 30.0, "b": 10.0, "c": 10.0}[name]
        return name

    given = [Task(key=name, name=name, work=work) for name, work in (("a", 3.0), ("b", 1.0), ("c", 1.0))]
    _, progress, _ = run(given, work, workers=1)
    (after_first,) = {(p.seconds_left, p.per_minute) for p in progress if p.done == 1}
    assert after_first == (20.0, 2.0)  # three fifths took 30 s


class Awkward(Exception):
    """An error whose arguments are not its message."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


def test_errors_travel_with_their_message_and_traceback() -> None:
    try:
        raise ValueError("`steps` must be less")
    except ValueError as error:
        told = portable(error)
    assert type(told) is ValueError and str(told) == "`steps` must be less"
    assert "test_errors_travel" in told.__notes__[0]
    told = portable(Awkward("a", 1))
    assert type(told) is RuntimeError and str(told) == "Awkward: a 1"
