"""The pace of the queue, by hand."""

from mergeprobe.serve.pace import FEWEST, KNOWN, Pace


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def paced(times, waiting=1):
    clock = Clock()
    pace = Pace(clock)
    for clock.now in times:
        pace.left(1, waiting)
    return pace, clock


def test_the_wait_is_what_the_last_ones_took():
    # ten leave, two seconds apart, the last one just now: 18 seconds for ten
    pace, clock = paced([2.0 * k for k in range(10)])
    assert pace.wait(0) == 0.0
    assert pace.wait(5) == 9.0
    # nothing leaves for 12 seconds more: 30 for ten
    clock.now += 12.0
    assert pace.wait(5) == 15.0


def test_only_the_newest_count():
    slow = [100.0 * k for k in range(50)]
    fast = [slow[-1] + k for k in range(1, KNOWN + 1)]
    pace, _ = paced(slow + fast)
    assert pace.wait(KNOWN) == KNOWN - 1


def test_nothing_is_said_before_enough_have_left():
    pace, _ = paced([float(k) for k in range(FEWEST - 1)])
    assert pace.wait(1000) == 0.0


def test_an_empty_queue_forgets():
    pace, clock = paced([float(k) for k in range(20)])
    clock.now = 1000.0
    pace.left(1, 0)
    assert pace.wait(10) == 0.0
