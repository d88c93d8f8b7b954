"""Reading and writing in threads of their own, beside the network, with little held in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import torch

_T = TypeVar("_T")


@contextmanager
def read_ahead(blocks: Iterable[_T]) -> Iterator[Iterator[_T]]:
    """Makes the next block in another thread while the caller works on the one before.

    Args:
        blocks: Blocks, made when they are asked for; none is None.

    Yields:
        An iterator over the same blocks, which raises what they raise. When the context is left, the thread
        has ended, at most one block later.
    """
    source = iter(blocks)
    with ThreadPoolExecutor(1, "ear-vae-reading") as thread:
        following = thread.submit(next, source, None)

        def ahead() -> Iterator[_T]:
            nonlocal following
            while (block := following.result()) is not None:
                following = thread.submit(next, source, None)
                yield block

        yield ahead()


def write_behind(blocks: Iterable[_T], write: Callable[[Iterator[_T]], None]) -> None:
    """Has blocks written in another thread while the next is made in this one.

    Args:
        blocks: Blocks; whatever they raise, an interruption too, is raised where the writer takes them, so
            that it removes what is not complete, and then here.
        write: Function that writes all of them, called in the other thread. No more is made for it once it
            has failed.

    Raises:
        BaseException: What making or writing them raised.
    """
    made: SimpleQueue[tuple[_T] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(1)

    def taken() -> Iterator[_T]:
        while (piece := made.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            room.release()
            yield piece[0]

    def work() -> None:
        # As in the thread that makes them: what it makes there may not be used outside.
        with torch.inference_mode():
            write(taken())

    with ThreadPoolExecutor(1, "ear-vae-writing") as thread:
        writing = thread.submit(work)
        writing.add_done_callback(lambda _: room.release())
        try:
            for block in blocks:
                room.acquire()
                if writing.done():
                    break
                made.put((block,))
            made.put(None)
            writing.result()
        except BaseException as error:
            made.put(error)
            writing.result()
            raise
