"""Work of one operation on as many threads as torch uses."""

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from fastdet.ops._library import call_below_autograd


def run_in_slices(count: int, work: int, most: int, fill: Callable[[int, int], None]) -> None:
    """Call `fill(first, last)` over [0, count) in slices of at most `most` work, on as many threads as torch uses.

    `work` is that of one index. One thread takes a thousand slices at once: the memory of a slice's result would come
    from the system anew each time.
    """
    threads = torch.get_num_threads()
    step = max(1, (most if threads > 1 else most << 10) // max(work, 1))
    firsts = range(0, count, step)
    inference = torch.is_inference_mode_enabled()

    def run(first: int) -> None:
        # These states belong to a thread: without them a worker would record a second gradient, or be refused the
        # inference tensors that it fills.
        with torch.inference_mode(inference):
            call_below_autograd(fill, first, min(first + step, count))

    if min(threads, len(firsts)) < 2:
        for first in firsts:
            run(first)
    else:
        list(_thread_pool(os.getpid(), threads).map(run, firsts))


@functools.cache
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One for each process: the threads of a pool do not survive the fork of a data loader's worker.

    Each worker uses one OpenMP thread: with a team for each there would be more threads than cores, and OpenMP then
    puts all of them to sleep after each operator, those of the caller's operators too.
    """
    pool = ThreadPoolExecutor(threads, initializer=_use_one_thread)
    started = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(started.wait)
        started.wait()
    except BaseException:
        # Such as an interruption: release the workers that stand at the barrier.
        started.abort()
        raise
    # The workers set the process-wide default; this sets it back, for this thread and those to come.
    torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    # A thread reads the setting at its first query, and then keeps it.
    torch.get_num_threads()
