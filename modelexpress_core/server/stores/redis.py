"""Metadata in Redis, which many servers share and which outlives them.

Each call is one script: it is atomic, and it takes the time from Redis, so that all servers go by one clock. A source
is a hash. Its id is in one set for its source id, in one for its model, and in one sorted set for its state, ordered by
the time of its last heartbeat. A lease is a hash that stays when the lease has expired, since its token must never go
back. All keys have one hash tag. It may be one Redis, or one with replicas behind one address, but no cluster.

After ``FLUSHALL``, or where Redis evicts the hash of a lease, sources are gone until their workers publish them again,
and the lease is free at once: two servers may both act on it until the first one renews. Tokens begin with the time of
Redis in milliseconds, so they still grow, unless its clock was set back meanwhile. The same holds for a replica that
takes over and lacks the last writes.

What a quota counts is in one hash: bytes in all, bytes of each owner, and size and owner of each record. They stand
together, so that Redis evicts all of them or none, and no count stays that its records do not explain.

A record that another program has damaged is left out, and counted. Its worker's next publication replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from modelexpress_core.contracts.metadata_store import (
    LeaderLease,
    Listing,
    NotPublisherError,
    Quota,
    Reaped,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreFullError,
    StoreUnavailableError,
    UnreadableRecordError,
)
from modelexpress_core.errors import InvalidURIError
from modelexpress_core.server.deadlines import time_out
from modelexpress_core.server.pacing import Pacer

if TYPE_CHECKING:
    from modelexpress_core.uri import ModelURI

__all__ = ["RedisStore", "open_redis"]

_T = TypeVar("_T")

_PREFIX = "{mx}:"

#: Time-out of one try, and the number of further tries if the connection breaks: in all less than clients wait.
_TIMEOUT_SECONDS = 2.5
_RETRIES = 2

#: Time-out of a script with all its tries and the wait for a connection.
_CALL_SECONDS = 4.0

#: Calls in flight; further calls wait for a connection, no longer than for Redis itself. It runs one script at a time.
_CONNECTIONS = 32

#: Sources that one script marks or removes at most: Redis does nothing else while it runs.
_REAPED_AT_ONCE = 500

#: Records that one script returns at most, for the same reason.
_LISTED_AT_ONCE = 500

_MAX_U32, _MAX_I64, _MAX_U64 = (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1

_COMMON = """
local prefix = '{mx}:'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function source(id) return prefix .. 'source:' .. id end
local function of_source(id) return prefix .. 'of-source:' .. id end
local function of_model(model) return prefix .. 'of-model:' .. model end
local function in_state(status) return prefix .. 'in-state:' .. status end
local states = prefix .. 'states'
local function enter(status, at, id)
    redis.call('ZADD', in_state(status), at, id)
    redis.call('SADD', states, status)
end
local function leave(status, id)
    redis.call('ZREM', in_state(status), id)
    if redis.call('EXISTS', in_state(status)) == 0 then redis.call('SREM', states, status) end
end
local usage = prefix .. 'usage'
local function bytes_of(name) return tonumber(redis.call('HGET', usage, name) or 0) end
local function counted(id)
    local size, owner = string.match(redis.call('HGET', usage, 'id:' .. id) or '', '^(%d+) (.*)$')
    return tonumber(size or 0), owner or ''
end
local function count(id, size, owner)
    redis.call('HSET', usage, 'id:' .. id, size .. ' ' .. owner)
    redis.call('HINCRBY', usage, 'total', size)
    redis.call('HINCRBY', usage, 'owner:' .. owner, size)
end
local function uncount(id)
    local size, owner = counted(id)
    if redis.call('HDEL', usage, 'id:' .. id) == 0 then return end
    for _, name in ipairs({'total', 'owner:' .. owner}) do
        if redis.call('HINCRBY', usage, name, -size) <= 0 then redis.call('HDEL', usage, name) end
    end
end
local function forget(id)
    local was = redis.pcall('HMGET', source(id), 'source_id', 'model_name', 'status')
    if was[1] then
        redis.call('SREM', of_source(was[1]), id)
        if was[2] then redis.call('SREM', of_model(was[2]), id) end
        if was[3] then leave(was[3], id) end
    end
    uncount(id)
    redis.call('DEL', source(id))
end
local function published_by_another(id, publisher)
    local was = redis.pcall('HGET', source(id), 'publisher')
    return type(was) == 'string' and was ~= '' and was ~= publisher
end
"""

_PUBLISH = """
local id, source_id, model, status, publisher = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local owner, size, owner_limit, total_limit = ARGV[11], tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
if published_by_another(id, publisher) then return 0 end
local freed, freed_owner = counted(id)
if owner_limit then
    if bytes_of('owner:' .. owner) - (freed_owner == owner and freed or 0) + size > owner_limit then return -1 end
    if bytes_of('total') - freed + size > total_limit then return -2 end
end
forget(id)
count(id, size, owner)
redis.call('HSET', source(id), 'source_id', source_id, 'model_name', model, 'status', status, 'publisher', publisher,
    'load', ARGV[6], 'updated', now, 'record', ARGV[7], 'identity', ARGV[8], 'worker', ARGV[9], 'grant_key', ARGV[10])
redis.call('SADD', of_source(source_id), id)
redis.call('SADD', of_model(model), id)
enter(status, now, id)
return 1
"""

_GET = """
local found = redis.pcall(
    'HMGET', source(ARGV[1]), 'record', 'status', 'load', 'updated', 'identity', 'worker', 'grant_key')
if found.err then return {now} end
found[8] = now
return found
"""

_ROWS = """
local function rows(ids, first, last, model, status)
    local found, unreadable = {}, 0
    for index = first, math.min(last, #ids) do
        local row = redis.pcall('HMGET', source(ids[index]), 'record', 'status', 'load', 'updated', 'model_name')
        if row.err then
            unreadable = unreadable + 1
        elseif row[1] and (model == '' or row[5] == model) and (status == '' or row[2] == status) then
            for field = 1, 4 do found[#found + 1] = row[field] end
        end
    end
    return found, unreadable
end
"""

_LIST = f"""{_ROWS}
local source_id, model, status, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local ids = {{}}
if source_id ~= '' then
    ids = redis.call('SMEMBERS', of_source(source_id))
elseif model ~= '' then
    ids = redis.call('SMEMBERS', of_model(model))
else
    for _, state in ipairs(status ~= '' and {{status}} or redis.call('SMEMBERS', states)) do
        for _, id in ipairs(redis.call('ZRANGE', in_state(state), 0, -1)) do ids[#ids + 1] = id end
    end
end
local found, unreadable = rows(ids, 1, most, model, status)
local rest = {{}}
for index = most + 1, #ids do rest[#rest + 1] = ids[index] end
return {{now, unreadable, found, rest}}
"""

_LIST_MORE = f"""{_ROWS}
local ids = {{}}
for index = 3, #ARGV do ids[#ids + 1] = ARGV[index] end
local found, unreadable = rows(ids, 1, #ids, ARGV[1], ARGV[2])
return {{now, unreadable, found}}
"""

_UPDATE = """
local id, status, load, publisher = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local was = redis.pcall('HMGET', source(id), 'status', 'record')
if not (was[1] and was[2]) then return 0 end  -- also where Redis has dropped what was there, or it is damaged
if published_by_another(id, publisher) then return -1 end
leave(was[1], id)
redis.call('HSET', source(id), 'status', status, 'updated', now)
if load ~= '' then redis.call('HSET', source(id), 'load', load) end
enter(status, now, id)
return 1
"""

_REAP = """
local stale, stale_after, removed_after, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local removed, made_stale = 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', in_state(stale), '-inf', now - removed_after, 'LIMIT', 0, most)) do
    forget(id)
    leave(stale, id)
    removed = removed + 1
end
for _, state in ipairs(redis.call('SMEMBERS', states)) do
    if state ~= stale then
        local silent = redis.call(
            'ZRANGEBYSCORE', in_state(state), '-inf', now - stale_after, 'WITHSCORES', 'LIMIT', 0, most - made_stale)
        for index = 1, #silent, 2 do
            local id, spoke = silent[index], silent[index + 1]
            leave(state, id)
            local exists = redis.call('EXISTS', source(id)) == 1
            if exists and type(redis.pcall('HSET', source(id), 'status', stale)) == 'number' then
                enter(stale, spoke, id)
            else
                forget(id)
            end
            made_stale = made_stale + 1
        end
    end
end
return {made_stale, removed}
"""

_COUNTS = """
local counts = {}
for _, state in ipairs(redis.call('SMEMBERS', states)) do
    counts[#counts + 1] = state
    counts[#counts + 1] = redis.call('ZCARD', in_state(state))
end
return counts
"""

_LEAD = """
local role, holder, milliseconds = prefix .. 'lease:' .. ARGV[1], ARGV[2], tonumber(ARGV[3])
local was = redis.call('HMGET', role, 'holder', 'until', 'token')
local token = was[3]
if was[1] ~= holder then
    if was[1] and now < tonumber(was[2]) then return false end
    token = string.format('%.0f', math.max(now, tonumber(token or 0)) + 1)
end
redis.call('HSET', role, 'holder', holder, 'until', string.format('%.0f', now + milliseconds), 'token', token)
return token
"""

_LEADER = """
local was = redis.call('HMGET', prefix .. 'lease:' .. ARGV[1], 'holder', 'until', 'token')
if not was[1] or now >= tonumber(was[2]) then return false end
return {was[1], was[3]}
"""


def open_redis(uri: ModelURI, settings: Mapping[str, str]) -> RedisStore:  # noqa: ARG001 - a factory's signature
    """The store at ``redis://[user:password@]host[:port][/database]``; ``rediss`` is TLS. Connects at first use.

    Raises:
        InvalidURIError: The database is no number, or redis-py does not take an option or its value.
    """
    if uri.path and not uri.path.isdigit():
        message = f"{uri} names no database of Redis: {uri.path!r} is no number"
        raise InvalidURIError(message, hint="write redis://host:6379/0")
    userinfo = f"{uri.userinfo}@" if uri.userinfo else ""
    query = f"?{urlencode(uri.query)}" if uri.query else ""
    try:
        return RedisStore(f"{uri.scheme}://{userinfo}{uri.authority}/{uri.path}{query}")
    except (TypeError, ValueError, redis.exceptions.RedisError) as exc:
        # Their messages name options, and may quote values.
        message = f"{uri} has an option or a value that redis-py does not take: {', '.join(uri.query)}"
        raise InvalidURIError(message, hint="correct the part after the question mark") from exc


class RedisStore:
    """Sources in a Redis that servers share.

    Args:
        url: Its URL, in the form that redis-py takes.
    """

    def __init__(self, url: str) -> None:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_TIMEOUT_SECONDS,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), _RETRIES),  # every script may run twice
            retry_on_error=[redis.exceptions.ConnectionError, redis.exceptions.TimeoutError],
        )
        # Raises for options that make no sense, and connects to nothing.
        pool.make_connection()  # type: ignore[no-untyped-call]  # it has no annotations
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._scripts = {
            script: self._redis.register_script(_COMMON + script)
            for script in (_PUBLISH, _GET, _LIST, _LIST_MORE, _UPDATE, _REAP, _COUNTS, _LEAD, _LEADER)
        }

    async def publish(self, source: StoredSource, quota: Quota | None = None) -> None:
        """Store ``source``, with the present time, in place of any record with the same ids."""
        record = source.record
        done = await self._run(
            _PUBLISH,
            _id(record.source_id, record.worker_id),
            record.source_id,
            record.model_name,
            record.status,
            record.publisher,
            "" if record.source_load is None else repr(record.source_load),
            _packed(record),
            source.identity,
            source.worker,
            source.grant_key,
            "" if quota is None else quota.owner,
            source.size_bytes,
            "" if quota is None else quota.owner_bytes,
            "" if quota is None else quota.total_bytes,
        )
        if not done:
            raise NotPublisherError(record.worker_id)
        if done < 0:
            raise StoreFullError(of_owner=done == -1)

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids; None if there is none."""
        found = await self._run(_GET, _id(source_id, worker_id))
        if len(found) == 1:
            raise UnreadableRecordError(source_id, worker_id)
        record, status, load, updated, identity, worker, grant_key, now = found
        if record is None:
            return None
        try:
            unpacked = _unpacked(record, status, load, updated)
            return StoredSource(unpacked, bytes(identity), bytes(worker), int(now), grant_key or b"")
        except _UNREADABLE as exc:
            raise UnreadableRecordError(source_id, worker_id) from exc

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that match ``query``."""
        filters = query.model_name or "", "" if query.status is None else query.status
        now, unreadable, rows, rest = await self._run(_LIST, query.source_id or "", *filters, _LISTED_AT_ONCE)
        records: list[SourceRecord] = []
        unreadable += await _unpack_rows(rows, records)
        for start in range(0, len(rest), _LISTED_AT_ONCE):
            now, damaged, rows = await self._run(_LIST_MORE, *filters, *rest[start : start + _LISTED_AT_ONCE])
            unreadable += damaged + await _unpack_rows(rows, records)
        return Listing(records, int(now), unreadable)

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """Set the state, the time and the load of a source; whether there is such a source."""
        load = "" if source_load is None else repr(source_load)
        done = await self._run(_UPDATE, _id(source_id, worker_id), status, load, publisher)
        if done < 0:
            raise NotPublisherError(worker_id)
        return bool(done)

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Mark silent sources as stale, and remove stale sources that have been silent for longer."""
        stale = removed = 0
        while True:
            made_stale, gone = await self._run(
                _REAP,
                int(SourceStatus.STALE),
                int(stale_after_seconds * 1000),
                int(removed_after_seconds * 1000),
                _REAPED_AT_ONCE,
            )
            stale, removed = stale + made_stale, removed + gone
            if made_stale + gone < _REAPED_AT_ONCE:
                return Reaped(stale, removed)

    async def counts(self) -> Mapping[int, int]:
        """The number of sources in each state."""
        found = await self._run(_COUNTS)
        return {int(state): int(count) for state, count in zip(found[::2], found[1::2], strict=True)}

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        """Take or renew the lease of ``role``; None if another holder has it."""
        # The time of Redis is cut to whole milliseconds: one more, and no lease ends early.
        token = await self._run(_LEAD, role, holder, math.ceil(seconds * 1000) + 1)
        return None if token is None else LeaderLease(role, holder, int(token))

    async def leader(self, role: str) -> LeaderLease | None:
        """The lease of the one that has ``role`` now; None if nobody has it."""
        found = await self._run(_LEADER, role)
        return None if found is None else LeaderLease(role, found[0].decode(), int(found[1]))

    async def check(self) -> None:
        """Return if Redis answers."""
        async with _as_store_unavailable():
            await _in_time(self._redis.ping())

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _run(self, script: str, *arguments: str | bytes | int) -> Any:  # noqa: ANN401 - what the script returns
        plain = [int(argument) if isinstance(argument, int) else argument for argument in arguments]  # no enumerations
        async with _as_store_unavailable():
            return await _in_time(self._scripts[script](keys=[f"{_PREFIX}states"], args=plain))


async def _in_time(answer: Awaitable[_T]) -> _T:
    """What Redis answers, before the caller's deadline.

    Raises:
        StoreUnavailableError: It takes too long: Redis is overloaded or frozen, or too many calls wait for it.
    """
    seconds = time_out(_CALL_SECONDS)
    try:
        return await asyncio.wait_for(answer, seconds)
    except asyncio.TimeoutError as exc:
        message = f"Redis: no answer within {seconds:.1f} s"
        raise StoreUnavailableError(message) from exc


@contextlib.asynccontextmanager
async def _as_store_unavailable() -> AsyncIterator[None]:
    """Raise errors of redis-py as ``StoreUnavailableError``. Their messages name host and port, and no password."""
    try:
        yield
    except (redis.exceptions.RedisError, OSError) as exc:
        raise StoreUnavailableError(f"Redis: {exc}") from exc


def _id(source_id: str, worker_id: str) -> str:
    """One text for the two ids; different pairs give different texts."""
    return f"{len(source_id)}:{source_id}:{worker_id}"


def _packed(record: SourceRecord) -> str:
    """The fields that a new publication changes, and a heartbeat does not."""
    fixed: Sequence[Any] = (
        record.source_id,
        record.worker_id,
        record.model_name,
        record.worker_rank,
        record.accelerator,
        dict(record.topology),
        record.training_step,
        record.layout_signature,
        record.publisher,
        record.publisher_address,
    )
    return json.dumps(fixed, separators=(",", ":"))


#: What `_unpacked` raises for a record that another program wrote or damaged.
_UNREADABLE = (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError)


async def _unpack_rows(rows: Sequence[bytes], records: list[SourceRecord]) -> int:
    """Append the records in ``rows``, four values each, to ``records``; returns how many cannot be read."""
    unreadable = 0
    pacer = Pacer()
    for start in range(0, len(rows), 4):
        await pacer.pause()
        try:
            records.append(_unpacked(*rows[start : start + 4]))
        except _UNREADABLE:
            unreadable += 1
    return unreadable


def _unpacked(packed: bytes, status: bytes, load: bytes, updated: bytes) -> SourceRecord:
    """The record of one row.

    Raises:
        Exception: One of ``_UNREADABLE``: it is no record, or a field has a value that the protocol cannot carry.
    """
    fields = json.loads(packed)
    source_id, worker_id, model_name, rank, accelerator, topology, step, layout, publisher, *more = fields
    texts = [source_id, worker_id, model_name, accelerator, layout or "", publisher, *more]
    for text in (*texts, *topology, *topology.values()):
        text.encode()
    if not (0 <= index(rank) <= _MAX_U32 and 0 <= index(step or 0) <= _MAX_U64 and 0 <= int(updated) <= _MAX_I64):
        reason = "a number is out of its range"
        raise ValueError(reason)
    return SourceRecord(
        source_id=source_id,
        worker_id=worker_id,
        model_name=model_name,
        worker_rank=rank,
        status=int(status),
        updated_at_ms=int(updated),
        accelerator=accelerator,
        topology=topology,
        training_step=step,
        layout_signature=layout,
        source_load=float(load) if load else None,
        publisher=publisher,
        publisher_address=more[0] if more else "",  # records of earlier versions have none
    )
