"""Independent work on several threads, in order."""

import threading
import time

import pytest
import torch

from mergeprobe.threads import in_order, one_thread


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_results_come_in_order_whoever_is_done_first(at_once):
    def work(i):
        time.sleep(0.02 if i % 2 == 0 else 0.0)
        return i * i

    assert list(in_order(work, range(9), at_once)) == [i * i for i in range(9)]
    assert list(in_order(work, [], at_once)) == []


def test_only_so_many_are_ahead_of_whoever_takes_the_results():
    begun = []
    found = in_order(lambda i: begun.append(i) or i, range(50), 2)
    for taken in range(5):
        assert next(found) == taken
        assert len(begun) <= taken + 1 + 2
    found.close()
    count = len(begun)
    time.sleep(0.02)
    assert len(begun) == count < 50


def test_the_first_error_comes_in_its_turn_and_ends_it():
    begun = []

    def work(i):
        begun.append(i)
        if i >= 2:
            raise ValueError(f"no {i}")
        return i

    found = in_order(work, range(100), 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="no 2"):
        next(found)
    assert list(found) == []
    assert len(begun) < 10


def test_threads_and_gradients_are_as_the_caller_has_them():
    before = torch.get_num_threads()

    def seen(_):
        return torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name

    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            found = list(in_order(seen, range(4), 2))
        assert {(threads, grad) for threads, grad, _ in found} == {(1, False)}
        assert all(name != threading.main_thread().name for _, _, name in found)
        assert [grad for _, grad, _ in in_order(seen, range(2), 2)] == [True, True]
        assert torch.get_num_threads() == 2
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
