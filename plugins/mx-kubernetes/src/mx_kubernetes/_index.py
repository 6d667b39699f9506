"""What this server knows of the sources, by id, model and state. It makes no requests.

Times are of a steady clock in milliseconds, which nobody sets: it decides how long a worker has been silent. Objects
have times of the wall clock of the server that wrote them; they are turned into those of the steady clock as they
arrive.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import attrs
from attrs import define

from modelexpress_core.contracts.metadata_store import SourceQuery, SourceRecord
from modelexpress_core.server.clock import Clock
from mx_kubernetes._objects import SourceObject

__all__ = ["Entry", "Index", "version_number"]

_K = TypeVar("_K", int, str)

#: How long heartbeats are kept of sources that are not known yet, and how many.
_EARLY_MS = 600_000.0
_MAX_EARLY = 100_000


@define(eq=False)
class Entry:
    """A source, and the latest heartbeat that is known of it.

    Attributes:
        source: Its object.
        spoke_ms: Time of the latest heartbeat or publication.
        load: The load that it told.
        visible_ms: Time of the latest heartbeat that other servers can see.
        own: Whether this server received that heartbeat, and so writes it.
    """

    source: SourceObject
    spoke_ms: float
    load: float | None
    visible_ms: float
    own: bool = False
    _listed: SourceRecord | None = None

    def record(self, wall_offset_ms: float) -> SourceRecord:
        """The record with the latest heartbeat, its time by the wall clock."""
        updated_at_ms = int(self.spoke_ms + wall_offset_ms)
        listed = self._listed
        if listed is None or listed.updated_at_ms != updated_at_ms:
            listed = attrs.evolve(self.source.record, updated_at_ms=updated_at_ms, source_load=self.load)
            self._listed = listed
        return listed

    def changed(self) -> None:
        """Forget the record that was made for lists."""
        self._listed = None


class Index:
    """The sources, kept by what watches and this server's own writes bring.

    An object that is older than what is known of the same source changes nothing: the answer to a write may come before
    the events that precede it.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.total_bytes = 0
        self.owner_bytes: Counter[str] = Counter()
        self._entries: dict[str, Entry] = {}
        self._by_source: defaultdict[str, set[str]] = defaultdict(set)
        self._by_model: defaultdict[str, set[str]] = defaultdict(set)
        self._by_status: defaultdict[int, set[str]] = defaultdict(set)
        self._deleted: set[str] = set()  # uids of objects that this server deleted, until the watch shows it
        self._unreadable: dict[
            str, tuple[object, object]
        ] = {}  # by name: source id and model, as far as they are there
        self._early: dict[str, tuple[float, float | None]] = {}

    def __len__(self) -> int:
        """Number of objects, those included that cannot be read."""
        return len(self._entries) + len(self._unreadable)

    def get(self, name: str) -> Entry | None:
        """The source whose object has this name."""
        return self._entries.get(name)

    def entries(self) -> Iterator[Entry]:
        """All sources, as they are now."""
        return iter([*self._entries.values()])

    def counts(self) -> Mapping[int, int]:
        """The number of sources in each state."""
        return {status: len(names) for status, names in self._by_status.items() if names}

    def names(self, query: SourceQuery) -> list[str]:
        """The sources that match the most selective part of ``query``."""
        if query.source_id is not None:
            return [*self._by_source.get(query.source_id, ())]
        if query.model_name is not None:
            return [*self._by_model.get(query.model_name, ())]
        if query.status is not None:
            return [*self._by_status.get(query.status, ())]
        return [*self._entries]

    # -- objects -------------------------------------------------------------------------------------------------------

    def put(self, source: SourceObject) -> Entry | None:
        """Take over an object of the API server; returns its source, None if it was deleted meanwhile."""
        if source.uid in self._deleted:
            return None
        entry = self._entries.get(source.name)
        if entry is not None and entry.source.uid == source.uid and not _is_newer(source, entry.source):
            return entry
        self._unreadable.pop(source.name, None)
        said_ms = self.clock.steady_ms(source.record.updated_at_ms)
        if entry is None:
            entry = Entry(source, said_ms, source.record.source_load, said_ms)
            self._add(entry)
            early = self._early.pop(source.name, None)
            if early is not None:
                self.heard(source.name, *early)
            return entry
        is_republished = entry.source.content != source.content
        self._drop(entry)
        entry.source = source
        self._add(entry)
        if is_republished or said_ms >= entry.spoke_ms:
            entry.load, entry.own = source.record.source_load, False
        entry.spoke_ms = max(entry.spoke_ms, said_ms)
        entry.visible_ms = max(entry.visible_ms, said_ms)
        entry.changed()
        return entry

    def put_unreadable(self, name: str, source_id: object, model: object) -> None:
        """Note that an object cannot be read."""
        self._forget(name)
        self._unreadable[name] = (source_id, model)

    def unreadable(self, query: SourceQuery) -> int:
        """Number of objects that cannot be read, and that may match ``query``."""
        return sum(
            (query.source_id is None or source_id in {None, query.source_id})
            and (query.model_name is None or model in {None, query.model_name})
            for source_id, model in self._unreadable.values()
        )

    def is_unreadable(self, name: str) -> bool:
        """Whether the object with this name cannot be read."""
        return name in self._unreadable

    def deleted_here(self, source: SourceObject) -> None:
        """Remove a source whose object this server has deleted."""
        self._deleted.add(source.uid)
        self.deleted(source.name, source.uid)

    def deleted(self, name: str, uid: str, *, shown: bool = False) -> None:
        """Remove a source; ``shown``: the watch has shown that its object is deleted."""
        if shown:
            self._deleted.discard(uid)
        entry = self._entries.get(name)
        if entry is None or entry.source.uid == uid:
            self._forget(name)

    def keep_only(self, names: set[str], uids: set[str], version: int) -> None:
        """Remove what a list of the API server lacks.

        Args:
            names: Names of all objects in the list.
            uids: Their uids.
            version: Version of the list: objects that were written after it stay.
        """
        for name in [each for each in self._unreadable if each not in names]:
            self._forget(name)
        for entry in self.entries():
            if entry.source.uid not in uids and version_number(entry.source.version) <= version:
                self._forget(entry.source.name)
        self._deleted &= uids

    def forget_versions(self) -> None:
        """Let any object replace what is known: the API server was set back to an earlier state."""
        for entry in self._entries.values():
            entry.source = attrs.evolve(entry.source, version="0")
        self._deleted.clear()

    # -- heartbeats ----------------------------------------------------------------------------------------------------

    def beat(self, entry: Entry, load: float | None) -> None:
        """Note a heartbeat that this server received."""
        entry.spoke_ms = self.clock.now_ms()
        if load is not None:
            entry.load = load
        entry.own = True
        entry.changed()

    def heard(self, name: str, spoke_ms: float, load: float | None) -> None:
        """Note a heartbeat that another server received."""
        entry = self._entries.get(name)
        if entry is None:
            if len(self._early) < _MAX_EARLY:
                self._early[name] = (spoke_ms, load)
            return
        entry.visible_ms = max(entry.visible_ms, spoke_ms)
        if spoke_ms > entry.spoke_ms:
            entry.spoke_ms, entry.load, entry.own = spoke_ms, load, False
            entry.changed()

    def forget_early(self) -> None:
        """Forget old heartbeats of sources that are not known."""
        since = self.clock.now_ms() - _EARLY_MS
        self._early = {name: beat for name, beat in self._early.items() if beat[0] >= since}

    def own_beats(self) -> Iterable[Entry]:
        """The sources whose latest heartbeat this server received."""
        return [entry for entry in self._entries.values() if entry.own]

    # -- indexes -------------------------------------------------------------------------------------------------------

    def _add(self, entry: Entry) -> None:
        source = entry.source
        self._entries[source.name] = entry
        self.total_bytes += source.size_bytes
        self.owner_bytes[source.owner] += source.size_bytes
        self._by_source[source.record.source_id].add(source.name)
        self._by_model[source.record.model_name].add(source.name)
        self._by_status[source.record.status].add(source.name)

    def _drop(self, entry: Entry) -> None:
        source = entry.source
        self.total_bytes -= source.size_bytes
        self.owner_bytes[source.owner] -= source.size_bytes
        if not self.owner_bytes[source.owner]:
            del self.owner_bytes[source.owner]
        _discard(self._by_source, source.record.source_id, source.name)
        _discard(self._by_model, source.record.model_name, source.name)
        _discard(self._by_status, source.record.status, source.name)

    def _forget(self, name: str) -> None:
        self._unreadable.pop(name, None)
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._drop(entry)


def version_number(version: str) -> int:
    """A resource version as a number: of two versions of one kind, the later one is larger."""
    return int(version) if version.isascii() and version.isdigit() else 0


def _is_newer(one: SourceObject, other: SourceObject) -> bool:
    return version_number(one.version) > version_number(other.version)


def _discard(index: defaultdict[_K, set[str]], key: _K, name: str) -> None:
    index[key].discard(name)
    if not index[key]:
        del index[key]
