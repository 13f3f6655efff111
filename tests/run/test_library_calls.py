import contextlib
import threading
import time

import pytest

from lit_puzzle.run.library_calls import library_errors, time_limit


def test_error_of_a_library_becomes_one_line_with_its_kind() -> None:
    said = r"^model/tokenizer\.json cannot be used: RuntimeError: a b$"
    with pytest.raises(ValueError, match=said) as raised, library_errors("model/tokenizer.json"):
        raise RuntimeError("a\n  b")
    assert isinstance(raised.value.__cause__, RuntimeError)


def endless() -> None:
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


def test_endless_work_is_interrupted_even_where_every_exception_is_caught() -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"the loop took more than 0\.1 seconds"), time_limit(0.1, "the loop"):
        endless()
    assert time.monotonic() - started < 5


def test_work_in_time_is_not_interrupted_later() -> None:
    with time_limit(0.05, "the work"):
        pass
    time.sleep(0.1)


def test_other_threads_work_without_a_limit() -> None:
    done: list[float] = []

    def work() -> None:
        with time_limit(0.01, "the work"):
            time.sleep(0.05)
            done.append(1.0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1.0]
