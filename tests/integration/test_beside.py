"""Reading and writing beside the network: order, bounds, and what is raised on either side."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ear_vae.cli.beside import read_ahead, write_behind


def test_reading_is_one_block_ahead_in_another_thread() -> None:
    made: list[int] = []
    threads = set()

    def blocks() -> Iterator[int]:
        for number in range(5):
            threads.add(threading.current_thread())
            made.append(number)
            yield number

    with read_ahead(blocks()) as ahead:
        for number in ahead:
            assert len(made) <= number + 2
    assert number == 4
    assert made == list(range(5))
    assert threading.current_thread() not in threads


def test_reading_raises_in_its_place_and_ends_with_its_context() -> None:
    def blocks() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    taken: list[int] = []
    before = threading.active_count()
    with read_ahead(blocks()) as ahead, pytest.raises(ValueError, match="damaged"):
        taken.extend(ahead)
    assert taken == [1]
    assert threading.active_count() == before
    with pytest.raises(KeyboardInterrupt), read_ahead(iter(range(1000))):
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_writing_takes_all_in_order_with_two_blocks_at_most_before_it() -> None:
    made, written = [], []

    def blocks() -> Iterator[int]:
        for number in range(50):
            # One is being written and one waits.
            assert number <= len(written) + 2
            made.append(number)
            yield number

    def write(audio: Iterator[int]) -> None:
        for number in audio:
            written.append(number)
            assert threading.current_thread() is not threading.main_thread()

    write_behind(blocks(), write)
    assert written == made == list(range(50))


def test_an_interruption_reaches_the_writer_which_cleans_up() -> None:
    told: list[BaseException] = []

    def blocks() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    def write(audio: Iterator[int]) -> None:
        try:
            for _ in audio:
                pass
        except BaseException as error:
            told.append(error)
            raise

    with pytest.raises(KeyboardInterrupt):
        write_behind(blocks(), write)
    assert [type(error) for error in told] == [KeyboardInterrupt]


def test_a_writer_that_fails_stops_the_work() -> None:
    made: list[int] = []

    def blocks() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    def write(audio: Iterator[int]) -> None:
        next(audio)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_behind(blocks(), write)
    assert len(made) < 10
