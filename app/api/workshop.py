"""A few threads for work that would hold the event loop, with a bounded line before them.

The event loop's own executor has neither: its line is endless, and leaving the process waits for its threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

from app.errors import OverloadedError

P = ParamSpec("P")
T = TypeVar("T")

_THREAD = "primerisk-workshop"


class Workshop:
    """Runs functions on at most `threads` threads; beyond `waiting_max` in the line it refuses.

    The threads are daemons, made as they are needed: leaving the process does not wait for them.
    """

    def __init__(self, threads: int, waiting_max: int) -> None:
        self._threads_max = threads
        self._jobs_max = threads + waiting_max
        self._jobs = 0
        self._line: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the work returns. Raises OverloadedError when the line is full."""
        if self._jobs >= self._jobs_max:
            detail = f"{self._jobs_max} heavy requests are being worked on"
            raise OverloadedError(detail, code="overloaded", headers={"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        call = functools.partial(contextvars.copy_context().run, functools.partial(work, *args, **kwargs))
        self._line.put(functools.partial(_deliver, loop, done, call, self._finished))
        self._jobs += 1
        if len(self._threads) < min(self._jobs, self._threads_max):
            self._threads.append(threading.Thread(target=_work_off, args=(self._line,), name=_THREAD, daemon=True))
            self._threads[-1].start()
        return await done

    def close(self) -> None:
        """Send every thread home after the work that it has; wait for none."""
        for _ in self._threads:
            self._line.put(None)

    def _finished(self) -> None:
        self._jobs -= 1


def is_at_work() -> bool:
    """Tell whether a thread of a workshop still lives in this process."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _work_off(line: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := line.get()) is not None:
        job()


def _deliver(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], call: Callable[[], T], finished: Callable[[], None]
) -> None:
    """Do the work unless nobody waits for it any more, and hand its outcome to the event loop."""

    def settle(result: T | None, error: BaseException | None) -> None:
        finished()
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only where T is

    result, failure = None, None
    if not done.done():
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001  it is raised where the result is awaited
            failure = error
    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(settle, result, failure)
