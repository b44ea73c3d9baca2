"""Have many small calls done by a cluster's workers, and take what they return in order: for chunks to be encoded."""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from lazyproc.engine.pulse import PATIENCE_SECONDS

log = logging.getLogger("lazyproc")

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Spread:
    """Does calls on a cluster; what it cannot do is done by the caller's process, so all of them are done.

    Parameters
    ----------
    client : Client
        The cluster's client.
    most : int
        So many calls at most are under way, or done and not yet taken.

    Notes
    -----
    The calls have no effect but what they return: any of them may be done twice, or by several workers. For one thread.
    """

    def __init__(self, client: Any, most: int) -> None:
        self._client = client
        self._most = max(1, most)
        self._name = f"lazyproc-encode-{uuid.uuid4().hex}"
        self._n_calls = 0
        self._trusted = True

    def __call__(self, call: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[Answer]:
        """Yield what `call` returns for each item, in their order; what it raises here is raised."""
        under_way: deque[tuple[Item, Any]] = deque()
        try:
            for item in items:
                under_way.append((item, self._begin(call, item)))
                if len(under_way) >= self._most:
                    yield self._end(call, *under_way.popleft())
            while under_way:
                yield self._end(call, *under_way.popleft())
        finally:
            left = [future for _, future in under_way if future is not None]
            if left and self._client.status == "running":
                with suppress(Exception):  # the connection may break just now: then the scheduler drops them itself
                    self._client.cancel(left)

    def _begin(self, call: Callable[[Item], Answer], item: Item) -> Any:
        """Return the future of a call, or None if it is to be done here."""
        if not self._trusted or self._client.status != "running":
            return None
        self._n_calls += 1
        try:
            return self._client.submit(call, item, key=(self._name, self._n_calls), pure=False)
        except Exception as error:
            self._give_up(error)
            return None

    def _end(self, call: Callable[[Item], Answer], item: Item, future: Any) -> Answer:
        if future is not None and self._trusted:
            try:
                returned: Answer = future.result(timeout=PATIENCE_SECONDS)
                return returned
            except Exception as error:  # of a worker, or of the connection: whatever it is, it is no reason to stop
                self._give_up(error)
            finally:
                with suppress(Exception):
                    future.release()
        return call(item)

    def _give_up(self, error: Exception) -> None:
        if self._trusted:
            log.warning(
                "the cluster does not encode the results any longer (%s: %s): it is done here, by one core",
                type(error).__name__,
                error,
            )
        self._trusted = False
