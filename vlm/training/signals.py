"""What a run does when it is asked to end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    """While in this, SIGTERM does no more than `call`."""

    def told(*_: Any) -> None:
        call()

    try:
        before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, told)
    except ValueError:  # not the main thread: signals are the caller's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
