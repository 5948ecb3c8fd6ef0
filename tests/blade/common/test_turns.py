"""A turn is one thread's, as long as that thread lives."""

import threading

import pytest

from blade.common.turns import Turn


def in_thread(function):
    """Call a function in a thread that ends then, and return what it returns or raises."""
    results = []

    def call():
        try:
            results.append(function())
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results[0]


def test_another_thread_is_refused_until_the_turn_is_left():
    turn = Turn("One at a time.")
    turn.take()
    turn.take()  # again, by the same thread
    refusal = in_thread(turn.take)
    assert isinstance(refusal, RuntimeError) and str(refusal) == "One at a time."
    assert in_thread(turn.leave) is False  # which leaves it to this one
    assert isinstance(in_thread(turn.take), RuntimeError)
    assert turn.leave() is True and turn.leave() is False
    assert in_thread(turn.take) is None


def test_the_turn_of_a_thread_that_has_ended_is_free():
    turn = Turn("One at a time.")
    in_thread(turn.take)
    turn.take()
    with pytest.raises(RuntimeError, match="One at a time"):
        raise in_thread(turn.take)
