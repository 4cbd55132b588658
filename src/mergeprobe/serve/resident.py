"""Adapters attached to the model: the ones used last, within a limit, pinned ones always."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from mergeprobe.adapters.attach import placed
from mergeprobe.adapters.rows import NONE, Rows, attached_rows
from mergeprobe.errors import AdapterError, DeploymentError
from mergeprobe.lowrank import LowRank
from mergeprobe.serve.catalogue import Source, Target


class Resident:
    """At most `limit` adapters on the model's device, the least recently used leaving first.

    pinned: sources that never leave. loads, evictions: how often so far.
    """

    def __init__(self, model: Any, limit: int) -> None:
        self.model, self.limit = model, limit
        self.pinned: set[Source] = set()
        self.held: dict[Source, Mapping[str, LowRank]] = {}  # least recently used first
        self.loads = self.evictions = 0
        self._attached = ExitStack()
        self._rows = Rows(0)
        self._order: tuple[Source, ...] = ()  # of the rows' choices

    def check_room(self, target: Target) -> None:
        """DeploymentError for a target that could never be resident beside what is pinned."""
        needed = len(self.pinned | {*target.sources})
        if needed > self.limit:
            raise DeploymentError(
                f"'{target.name}' needs {len(target.sources)} adapters resident and "
                f"{len(self.pinned)} are pinned, but at most {self.limit} can be; "
                f"use --max-adapters {needed}"
            )

    def ensure(self, sources: Sequence[Source], in_use: Collection[Source]) -> bool:
        """Whether all of them are resident now; False where those in use leave no room.

        Raises AdapterError or AdapterMismatch for one that cannot be read, and changes nothing.
        """
        missing = [source for source in sources if source not in self.held]
        if missing:
            stays = {*in_use, *sources} | self.pinned
            leaving = [source for source in self.held if source not in stays]
            surplus = len(self.held) + len(missing) - self.limit
            if surplus > len(leaving):
                return False
            ready = {source: self._ready(source) for source in missing}
            self._change(ready, leaving[: max(0, surplus)])
        for source in sources:
            self.held[source] = self.held.pop(source)
        return True

    def forget(self, source: Source) -> None:
        """Detaches an adapter that is served no more, and in no use."""
        if source in self.held:
            self._change({}, [source])

    def choose(self, sources: Sequence[Source | None]) -> None:
        """The adapter of each row of the next forward pass; None for the base."""
        position = {source: at for at, source in enumerate(self._order)}
        self._rows.choose([NONE if s is None else position[s] for s in sources])

    def close(self) -> None:
        self.held.clear()
        self._attach()

    def _ready(self, source: Source) -> Mapping[str, LowRank]:
        """On the device. Entries that overflow the model's dtype would spoil other rows too."""
        updates = placed(self.model, source.read())
        for name, update in updates.items():
            if not (update.A.isfinite().all() and update.B.isfinite().all()):
                raise AdapterError(
                    f"'{source.name}' has entries in '{name}' that overflow {update.B.dtype}"
                )
        return updates

    def _change(
        self, coming: Mapping[Source, Mapping[str, LowRank]], leaving: Sequence[Source]
    ) -> None:
        for source in leaving:
            del self.held[source]
        self.held |= coming
        self.loads += len(coming)
        self.evictions += len(leaving)
        self._attach()

    def _attach(self) -> None:
        # the old stacks go first, so that no two of them are ever held at once
        self._attached.close()
        self._order = ()
        try:
            updates = [*self.held.values()]
            self._rows = self._attached.enter_context(attached_rows(self.model, updates))
        except BaseException:
            self.held.clear()  # so that nothing is taken for attached that is not
            raise
        self._order = tuple(self.held)
