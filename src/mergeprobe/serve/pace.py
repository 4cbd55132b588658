"""How long a request that comes now would wait: what the queue's last requests took to leave it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

KNOWN = 64  # requests that the pace is taken from
FEWEST = 8  # below this nothing is said


class Pace:
    """Times at which requests left the queue, since it was last empty. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._left: deque[float] = deque(maxlen=KNOWN)

    def left(self, count: int, waiting: int) -> None:
        """`count` requests have left the queue, `waiting` are still in it."""
        if waiting:
            self._left.extend([self.clock()] * count)
        else:  # an empty queue has no pace: the next request may be an hour away
            self._left.clear()

    def wait(self, ahead: int) -> float:
        """Expected seconds until `ahead` requests have left; 0 where the pace is not known yet."""
        if len(self._left) < FEWEST:
            return 0.0
        return ahead * (self.clock() - self._left[0]) / len(self._left)
