"""Threads: one a core for independent pieces of work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    work: Callable[[In], Out], items: Iterable[In], at_once: int | None = None
) -> Generator[Out, None, None]:
    """work(item) of every item, in their order; `at_once` (default: torch's threads, at most one a
    core) of them are done at a time, each by one torch thread, and one result waits at most.

    For pieces that do not depend on each other. Gradients are on or off as they are for the
    caller. The first error is raised in its turn, and what has not begun by then is not done.
    """
    at_once = at_once or min(torch.get_num_threads(), os.cpu_count() or 1)
    if at_once < 2:
        yield from map(work, items)
        return
    grad = torch.is_grad_enabled()

    def alike(item: In) -> Out:
        with torch.set_grad_enabled(grad):
            return work(item)

    waiting: deque[Future[Out]] = deque()
    with one_thread(), ThreadPoolExecutor(at_once) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(alike, item))
                if len(waiting) > at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
