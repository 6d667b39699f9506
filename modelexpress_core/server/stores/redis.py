"""Metadata in Redis: shared by many servers, and there after they are gone.

Each call is one script, so that it is atomic, and takes the time from Redis, so that there is one clock. A source is a
hash; its ids stand in a set for its source and one for its model, and, by the time when its worker last spoke, in a
sorted set for its state. All keys have one hash tag. A cluster is not spoken to: one Redis, or one with
replicas behind one address.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from modelexpress_core.contracts.metadata_store import (
    Listing,
    NotPublisherError,
    Reaped,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreUnavailableError,
)
from modelexpress_core.errors import InvalidURIError

if TYPE_CHECKING:
    from modelexpress_core.uri import ModelURI

__all__ = ["RedisStore", "open_redis"]

_PREFIX = "{mx}:"

#: How long one call may take, and how often it is tried where the connection breaks: in all less than clients wait.
_TIMEOUT_SECONDS = 2.5
_RETRIES = 2

#: Calls that Redis is asked at once; others wait for their turn as long as for Redis. It answers one at a time anyway.
_CONNECTIONS = 32

#: Sources that are made stale or removed in one script: Redis does nothing else in that time.
_REAPED_AT_ONCE = 500

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
local function forget(id)
    local was = redis.call('HMGET', source(id), 'source_id', 'model_name', 'status')
    if was[1] then
        redis.call('SREM', of_source(was[1]), id)
        redis.call('SREM', of_model(was[2]), id)
        leave(was[3], id)
    end
    redis.call('DEL', source(id))
end
local function another_published(id, publisher)
    local was = redis.call('HGET', source(id), 'publisher')
    return was and was ~= '' and was ~= publisher
end
"""

_PUBLISH = """
local id, source_id, model, status, publisher = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if another_published(id, publisher) then return 0 end
forget(id)
redis.call('HSET', source(id), 'source_id', source_id, 'model_name', model, 'status', status, 'publisher', publisher,
    'load', ARGV[6], 'updated', now, 'record', ARGV[7], 'identity', ARGV[8], 'worker', ARGV[9])
redis.call('SADD', of_source(source_id), id)
redis.call('SADD', of_model(model), id)
enter(status, now, id)
return 1
"""

_GET = """
local found = redis.call('HMGET', source(ARGV[1]), 'record', 'status', 'load', 'updated', 'identity', 'worker')
found[7] = now
return found
"""

_LIST = """
local source_id, model, status = ARGV[1], ARGV[2], ARGV[3]
local ids = {}
if source_id ~= '' then
    ids = redis.call('SMEMBERS', of_source(source_id))
elseif model ~= '' then
    ids = redis.call('SMEMBERS', of_model(model))
else
    for _, state in ipairs(status ~= '' and {status} or redis.call('SMEMBERS', states)) do
        for _, id in ipairs(redis.call('ZRANGE', in_state(state), 0, -1)) do ids[#ids + 1] = id end
    end
end
local rows = {now}
for _, id in ipairs(ids) do
    local row = redis.call('HMGET', source(id), 'record', 'status', 'load', 'updated', 'model_name')
    if row[1] and (model == '' or row[5] == model) and (status == '' or row[2] == status) then
        rows[#rows + 1] = row[1]
        rows[#rows + 1] = row[2]
        rows[#rows + 1] = row[3]
        rows[#rows + 1] = row[4]
    end
end
return rows
"""

_UPDATE = """
local id, status, load, publisher = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local was = redis.call('HMGET', source(id), 'status', 'record')
if not was[2] then return 0 end  -- also where Redis has dropped what was there
if another_published(id, publisher) then return -1 end
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
            if redis.call('EXISTS', source(id)) == 1 then
                redis.call('HSET', source(id), 'status', stale)
                enter(stale, spoke, id)
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
local role, holder, milliseconds = prefix .. 'role:' .. ARGV[1], ARGV[2], ARGV[3]
local has = redis.call('GET', role)
if has and has ~= holder then return 0 end
redis.call('SET', role, holder, 'PX', milliseconds)
return 1
"""


def open_redis(uri: ModelURI, settings: Mapping[str, str]) -> RedisStore:  # noqa: ARG001 - a factory's signature
    """The store at ``redis://[user:password@]host[:port][/database]``; ``rediss`` is TLS. Connects at first use.

    Raises:
        InvalidURIError: The database is no number, or redis-py does not know an option, or not such a value.
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
        message = f"{uri} has an option that redis-py does not take, or not such a value: {', '.join(uri.query)}"
        raise InvalidURIError(message, hint="correct the part after the question mark") from exc


class RedisStore:
    """Sources in a Redis that servers share.

    Args:
        url: Where it is, as redis-py takes it.
    """

    def __init__(self, url: str) -> None:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_TIMEOUT_SECONDS,
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), _RETRIES),  # every call may be made twice
            retry_on_error=[redis.exceptions.ConnectionError, redis.exceptions.TimeoutError],
        )
        # Says now which options make no sense, and connects to nothing.
        pool.make_connection()  # type: ignore[no-untyped-call]  # it has no annotations
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._scripts = {
            script: self._redis.register_script(_COMMON + script)
            for script in (_PUBLISH, _GET, _LIST, _UPDATE, _REAP, _COUNTS, _LEAD)
        }

    async def publish(self, source: StoredSource) -> None:
        """Keep ``source`` in place of what was there under its ids, as of now."""
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
        )
        if not done:
            raise NotPublisherError(record.worker_id)

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids, if there is one."""
        record, status, load, updated, identity, worker, now = await self._run(_GET, _id(source_id, worker_id))
        if record is None:
            return None
        return StoredSource(_unpacked(record, status, load, updated), identity, worker, int(now))

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that ``query`` asks for."""
        status = "" if query.status is None else query.status
        now, *rows = await self._run(_LIST, query.source_id or "", query.model_name or "", status)
        records = [_unpacked(*rows[start : start + 4]) for start in range(0, len(rows), 4)]
        return Listing(records, int(now))

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """Set the state of a source, as of now; False where there is no such source."""
        load = "" if source_load is None else repr(source_load)
        done = await self._run(_UPDATE, _id(source_id, worker_id), status, load, publisher)
        if done < 0:
            raise NotPublisherError(worker_id)
        return bool(done)

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Make sources stale whose worker has been silent so long, and remove stale ones after so long a silence."""
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
        """How many sources are in each state."""
        found = await self._run(_COUNTS)
        return {int(state): int(count) for state, count in zip(found[::2], found[1::2], strict=True)}

    async def lead(self, role: str, holder: str, seconds: float) -> bool:
        """Whether ``holder`` has ``role`` for the next ``seconds``."""
        return bool(await self._run(_LEAD, role, holder, max(1, int(seconds * 1000))))

    async def check(self) -> None:
        """Return where Redis answers."""
        async with _told():
            await self._redis.ping()

    async def close(self) -> None:
        """Give up the connections."""
        await self._redis.aclose()

    async def _run(self, script: str, *arguments: str | bytes | int) -> Any:  # noqa: ANN401 - what the script returns
        plain = [int(argument) if isinstance(argument, int) else argument for argument in arguments]  # no enumerations
        async with _told():
            return await self._scripts[script](keys=[f"{_PREFIX}states"], args=plain)


@contextlib.asynccontextmanager
async def _told() -> AsyncIterator[None]:
    """Whatever keeps Redis from answering, told as that. Its messages name host and port, and no password."""
    try:
        yield
    except (redis.exceptions.RedisError, OSError) as exc:
        raise StoreUnavailableError(f"Redis: {exc}") from exc


def _id(source_id: str, worker_id: str) -> str:
    """One text for both; no other two ids make the same."""
    return f"{len(source_id)}:{source_id}:{worker_id}"


def _packed(record: SourceRecord) -> str:
    """What a new record changes, and a heartbeat does not."""
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
    )
    return json.dumps(fixed, separators=(",", ":"))


def _unpacked(packed: bytes, status: bytes, load: bytes, updated: bytes) -> SourceRecord:
    source_id, worker_id, model_name, rank, accelerator, topology, step, layout, publisher = json.loads(packed)
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
    )
