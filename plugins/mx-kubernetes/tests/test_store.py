"""What the store in Kubernetes promises beyond the contract: several servers, large records, objects for people."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
import urllib.request
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import trustme

from devtools.kube_apiserver import KubeApiServer
from modelexpress_core.contracts.metadata_store import (
    NotPublisherError,
    PodReference,
    Reaped,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreUnavailableError,
    UnreadableRecordError,
)
from modelexpress_core.errors import InvalidURIError, SettingsError
from modelexpress_core.server.clock import Clock
from modelexpress_core.uri import ModelURI
from mx_kubernetes._client import Kubernetes
from mx_kubernetes._objects import name_of
from mx_kubernetes._store import KubernetesStore, open_kubernetes

pytestmark = [pytest.mark.xdist_group("kubernetes"), pytest.mark.slow]

_T = TypeVar("_T")
_READY, _STALE = SourceStatus.READY, SourceStatus.STALE
NewStore = Callable[..., KubernetesStore]


def source(worker: str = "a", data: bytes = b"worker", **changes: Any) -> StoredSource:
    record = attrs.evolve(SourceRecord("source", worker, "acme/model", status=_READY), **changes)
    return StoredSource(record, b"identity", data, grant_key=b"key")


def with_stores(scenario: Callable[..., Awaitable[_T]], *stores: Callable[[], KubernetesStore]) -> _T:
    """Run ``scenario`` with stores that are opened for it, and closed after it."""

    async def opened() -> _T:
        made = [store() for store in stores]
        try:
            return await scenario(*made)
        finally:
            for each in made:
                await each.close()

    return asyncio.run(opened())


async def eventually(condition: Callable[[], Awaitable[_T]], seconds: float = 60.0) -> _T:
    deadline = time.monotonic() + seconds
    while not (value := await condition()) and time.monotonic() < deadline:  # noqa: ASYNC110 - no event says it
        await asyncio.sleep(0.05)
    return value


def objects(server: KubeApiServer, namespace: str, plural: str) -> list[dict[str, Any]]:
    found = server.request("GET", f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/{plural}")["items"]
    return list(found)


# -- several servers ---------------------------------------------------------------------------------------------------


def test_a_source_is_seen_by_other_servers(new_store: NewStore) -> None:
    """In lists, whole, with its state, and no longer once it is replaced or removed."""

    async def scenario(one: KubernetesStore, other: KubernetesStore) -> None:
        published = source(data=secrets.token_bytes(1000))
        assert list((await other.list(SourceQuery())).records) == []
        await one.publish(published)

        async def listed() -> list[SourceRecord]:
            return list((await other.list(SourceQuery("source", status=_READY))).records)

        [record] = await eventually(listed)
        assert record == attrs.evolve(published.record, updated_at_ms=record.updated_at_ms)
        found = await other.get("source", "a")
        assert found is not None
        assert (published.identity, published.worker, b"key") == (found.identity, found.worker, found.grant_key)

        await one.update("source", "a", SourceStatus.INITIALIZING, None, "")

        assert await eventually(lambda: _is_empty(other, SourceQuery("source", status=_READY)))
        await one.publish(source(data=b"new"))
        assert await eventually(listed)
        found = await other.get("source", "a")
        assert found is not None
        assert b"new" == found.worker

    with_stores(scenario, new_store, new_store)


async def _is_empty(store: KubernetesStore, query: SourceQuery) -> bool:
    return not (await store.list(query)).records


def test_another_server_reads_the_newest_publication(new_store: NewStore) -> None:
    """Also where its watch has not brought it yet: parts that are gone make it look again."""

    async def scenario(one: KubernetesStore, other: KubernetesStore) -> None:
        await one.publish(source(data=b"0"))
        assert await eventually(lambda: other.get("source", "a"))
        for number in range(1, 30):
            await one.publish(source(data=str(number).encode()))
            found = await other.get("source", "a")
            assert found is not None
            assert int(found.worker) in {number, number - 1}

    with_stores(scenario, new_store, new_store)


def test_of_two_publishers_one_gets_the_source(new_store: NewStore) -> None:
    """Servers that have not heard of each other's write learn it from the conflict."""

    async def scenario(one: KubernetesStore, other: KubernetesStore) -> None:
        await asyncio.gather(one.check(), other.check())
        for number in range(10):
            answers = await asyncio.gather(
                one.publish(source(f"w{number}", publisher="alice")),
                other.publish(source(f"w{number}", publisher="bob")),
                return_exceptions=True,
            )
            [refused] = [answer for answer in answers if answer is not None]
            assert isinstance(refused, NotPublisherError)
            winner = "alice" if answers[0] is None else "bob"
            for store in (one, other):
                found = await store.get("source", f"w{number}")
                assert found is not None
                assert winner == found.record.publisher

    with_stores(scenario, new_store, new_store)


def test_heartbeats_of_many_workers_are_one_write(
    api_server: KubeApiServer, namespace: str, new_store: NewStore
) -> None:
    """Other servers see their times and loads; the objects of the workers stay as they are."""

    async def scenario(one: KubernetesStore, other: KubernetesStore) -> None:
        names = [f"w{number}" for number in range(50)]
        for name in names:
            await one.publish(source(name))
        before = {each["metadata"]["name"]: each["metadata"] for each in objects(api_server, namespace, "modelsources")}
        for name in names:
            assert await one.update("source", name, _READY, 0.25, "")

        async def loads() -> bool:
            records = (await other.list(SourceQuery("source"))).records
            return [record.source_load for record in records] == [0.25] * len(names)

        assert await eventually(loads)
        mine = {record.worker_id: record for record in (await one.list(SourceQuery("source"))).records}
        for record in (await other.list(SourceQuery("source"))).records:
            assert abs(mine[record.worker_id].updated_at_ms - record.updated_at_ms) <= 2
        after = {each["metadata"]["name"]: each["metadata"] for each in objects(api_server, namespace, "modelsources")}
        assert before == after
        [beats] = objects(api_server, namespace, "sourceheartbeats")
        assert len(names) == beats["spec"]["workers"] == len(beats["spec"]["beats"])
        assert 1 == beats["metadata"]["generation"]
        assert len(json.dumps(beats["metadata"]["managedFields"])) < 1000, "the API server must not track each worker"

    with_stores(scenario, lambda: new_store(heartbeat_seconds=3.0), new_store)


def test_a_worker_whose_server_is_gone_is_seen_at_its_next_heartbeat(new_store: NewStore) -> None:
    """Another server writes a heartbeat at once if what others can see is old."""
    interval = 1000.0
    late = [0.0]
    clock = Clock(lambda: time.monotonic() + late[0], lambda: time.time() + late[0])

    async def scenario(one: KubernetesStore, other: KubernetesStore) -> None:
        await one.publish(source())
        assert await eventually(lambda: other.get("source", "a"))
        assert await other.update("source", "a", _READY, 0.25, "")
        late[0] = 2 * interval
        assert await other.update("source", "a", _READY, 0.75, "")

        async def seen() -> bool:
            found = await one.get("source", "a")
            return found is not None and found.record.source_load == 0.75

        assert await eventually(seen, interval / 2), "it waits for the next regular write"

    with_stores(scenario, new_store, lambda: new_store(heartbeat_seconds=interval, clock=clock))


def test_heartbeats_are_written_when_a_server_ends(new_store: NewStore) -> None:
    """The next server knows them."""

    async def first(store: KubernetesStore) -> int:
        await store.publish(source())
        await asyncio.sleep(0.05)
        await store.update("source", "a", _READY, 0.5, "")
        found = await store.get("source", "a")
        assert found is not None
        return found.record.updated_at_ms

    async def second(store: KubernetesStore) -> SourceRecord:
        found = await store.get("source", "a")
        assert found is not None
        return found.record

    beaten_at = with_stores(first, new_store)
    record = with_stores(second, new_store)

    assert 0.5 == record.source_load
    assert abs(beaten_at - record.updated_at_ms) <= 2


def test_the_reaper_counts_what_other_servers_heard(
    api_server: KubeApiServer, namespace: str, new_store: NewStore
) -> None:
    """And removes the heartbeats of servers that are gone, once the state of their workers is written."""
    late = [0.0]
    clock = Clock(lambda: time.monotonic() + late[0], lambda: time.time() + late[0])

    async def publish(store: KubernetesStore) -> None:
        await store.publish(source("alive"))
        await store.publish(source("gone"))
        await store.update("source", "gone", _READY, None, "")

    async def scenario(one: KubernetesStore, leader: KubernetesStore) -> None:
        await leader.check()
        late[0] = 1000.0
        await one.update("source", "alive", _READY, 0.5, "")

        async def heard() -> bool:
            found = await leader.get("source", "alive")
            return found is not None and found.record.source_load == 0.5

        async def reaped() -> bool:
            return (await leader.reap(500.0, 3600)).stale == 1

        assert await eventually(heard)
        assert await eventually(reaped)
        stale = (await leader.list(SourceQuery(status=_STALE))).records
        assert ["gone"] == [record.worker_id for record in stale]
        assert 1 == len(objects(api_server, namespace, "sourceheartbeats"))

    with_stores(publish, new_store)
    assert 1 == len(objects(api_server, namespace, "sourceheartbeats"))
    brisk = {"heartbeat_seconds": 0.2}
    with_stores(scenario, lambda: new_store(clock=clock, **brisk), lambda: new_store(clock=clock, **brisk))


def test_no_worker_is_marked_soon_after_an_outage(new_store: NewStore) -> None:
    """Other servers may have heartbeats to write that came in time."""

    async def scenario(store: KubernetesStore) -> None:
        await store.publish(source())
        await asyncio.sleep(1.1)
        assert store._opened is not None
        store._opened.view.troubled_at = time.monotonic()  # as when the API server did not answer
        assert Reaped() == await store.reap(1.0, 3600)

        async def marked() -> bool:
            return (await store.reap(1.0, 3600)).stale == 1

        assert await eventually(marked)

    with_stores(scenario, new_store)


def test_heartbeats_of_very_many_workers_are_several_objects(
    api_server: KubeApiServer, namespace: str, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is below the limit of an object, and together they have all."""
    monkeypatch.setattr("mx_kubernetes._heartbeats._OBJECT_BEATS", 10)
    names = [f"w{number}" for number in range(45)]

    async def scenario(store: KubernetesStore) -> None:
        for name in names:
            await store.publish(source(name))
        for name in names:
            await store.update("source", name, _READY, None, "")

    with_stores(scenario, new_store)

    written = [each["spec"]["beats"] for each in objects(api_server, namespace, "sourceheartbeats")]
    assert 5 == len(written)
    assert {name_of("source", name) for name in names} == {name for beats in written for name in beats}


def test_a_role_of_a_server_that_is_gone_goes_to_another(new_store: NewStore) -> None:
    """Once its lease was not renewed for as long as it lasts; the token grows, and the object names the new holder."""

    async def first(store: KubernetesStore) -> int:
        lease = await store.lead("role", "one", 1.0)
        assert lease is not None
        return lease.token

    async def second(store: KubernetesStore) -> None:
        begun = time.monotonic()
        assert await store.lead("role", "two", 1.0) is None
        lease = await eventually(lambda: store.lead("role", "two", 1.0))
        assert lease is not None
        assert time.monotonic() - begun >= 1.0
        assert lease.token > token
        assert lease == await store.leader("role")

    token = with_stores(first, new_store)
    with_stores(second, new_store)


def test_a_renewal_costs_less_than_a_write(api_server: KubeApiServer, namespace: str, new_store: NewStore) -> None:
    """The role of each version of a model in a cache is renewed every five seconds."""

    async def scenario(store: KubernetesStore) -> None:
        for _ in range(20):
            assert await store.lead("role", "one", 600.0) is not None

    with_stores(scenario, new_store)

    [lease] = api_server.request("GET", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases")["items"]
    assert lease["spec"]["acquireTime"] == lease["spec"]["renewTime"]
    assert ("one", 1200, 1) == tuple(
        lease["spec"][key] for key in ("holderIdentity", "leaseDurationSeconds", "leaseTransitions")
    )


# -- objects -----------------------------------------------------------------------------------------------------------


def test_a_record_above_the_limit_of_an_object_is_split(
    api_server: KubeApiServer, namespace: str, new_store: NewStore
) -> None:
    """It comes back whole, and its parts go with it."""
    large = source(data=secrets.token_bytes(5 << 20), topology={"k": "v" * 8000})

    async def scenario(store: KubernetesStore, other: KubernetesStore) -> None:
        await store.publish(large)
        assert await eventually(lambda: _has(other, "a"))
        for each in (store, other):
            found = await each.get("source", "a")
            assert found is not None
            assert large.worker == found.worker
        parts = objects(api_server, namespace, "modelsourcecontents")
        assert 11 == len(parts)
        assert max(len(json.dumps(part)) for part in parts) < 1 << 20

        await store.publish(source(data=b"small"))

        async def one_part() -> bool:
            return len(objects(api_server, namespace, "modelsourcecontents")) == 1

        assert await eventually(one_part)
        found = await store.get("source", "a")
        assert found is not None
        assert b"small" == found.worker

    with_stores(scenario, new_store, new_store)


async def _has(store: KubernetesStore, worker: str) -> bool:
    return any(record.worker_id == worker for record in (await store.list(SourceQuery())).records)


def test_a_source_that_is_removed_leaves_nothing(
    api_server: KubeApiServer, namespace: str, new_store: NewStore
) -> None:
    """Neither its parts."""

    async def scenario(store: KubernetesStore) -> None:
        await store.publish(source(data=secrets.token_bytes(1 << 20)))
        await asyncio.sleep(0.05)
        await store.reap(0.01, 0.01)
        await store.reap(0.01, 0.01)
        assert await store.get("source", "a") is None

    with_stores(scenario, new_store)

    assert [] == objects(api_server, namespace, "modelsources")
    assert [] == objects(api_server, namespace, "modelsourcecontents")


def test_the_pod_of_a_worker_owns_its_source(api_server: KubeApiServer, namespace: str, new_store: NewStore) -> None:
    """So that Kubernetes removes the source with the pod; a pod elsewhere, or what is no pod, owns nothing."""
    uid = "0a1b2c3d-0000-4000-8000-0123456789ab"
    pods = {
        "own": PodReference("worker-0", uid, namespace),
        "elsewhere": PodReference("worker-0", uid, "default"),
        "no-uid": PodReference("worker-0", "../x", namespace),
        "no-name": PodReference("Worker 0", uid, namespace),
        "none": None,
    }

    async def scenario(store: KubernetesStore) -> None:
        for worker, pod in pods.items():
            await store.publish(attrs.evolve(source(worker), pod=pod))

    with_stores(scenario, new_store)

    owned = {
        each["spec"]["workerId"]: each["metadata"].get("ownerReferences")
        for each in objects(api_server, namespace, "modelsources")
    }
    reference = {"apiVersion": "v1", "kind": "Pod", "name": "worker-0", "uid": uid}
    assert {"own": [reference], "elsewhere": None, "no-uid": None, "no-name": None, "none": None} == owned
    of_parts = [
        each["metadata"].get("ownerReferences") for each in objects(api_server, namespace, "modelsourcecontents")
    ]
    assert 1 == of_parts.count([reference])


def test_kubectl_shows_what_matters(api_server: KubeApiServer, namespace: str, new_store: NewStore) -> None:
    """Model, ready, rank, bytes and age; nothing secret is in these objects."""
    published = source(data=b"secret of the worker", worker_rank=3)
    path = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/modelsources"

    with_stores(lambda store: store.publish(published), new_store)

    headers = {
        "Authorization": f"Bearer {api_server.token}",
        "Accept": "application/json;as=Table;v=v1;g=meta.k8s.io",
    }
    request = urllib.request.Request(api_server.url + path, headers=headers)
    with urllib.request.urlopen(request, context=api_server.tls, timeout=30) as response:
        text = response.read().decode()
    table = json.loads(text)
    shown = [each["name"] for each in table["columnDefinitions"] if not each["priority"]]
    cells = dict(zip([each["name"] for each in table["columnDefinitions"]], table["rows"][0]["cells"], strict=True))
    assert ["Name", "Model", "Ready", "Rank", "Bytes", "Age"] == shown
    assert ("acme/model", True, 3, published.size_bytes) == tuple(cells[each] for each in shown[1:5])
    [plain] = objects(api_server, namespace, "modelsources")
    for hidden in (b"secret of the worker", b"key", b"identity"):
        assert base64.b64encode(hidden).decode() not in json.dumps(plain)


def test_labels_of_others_stay(api_server: KubeApiServer, namespace: str, new_store: NewStore) -> None:
    """A publication replaces its own fields alone, and all of them."""
    path = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/modelsources/{name_of('source', 'a')}"
    label = {"metadata": {"labels": {"team": "inference"}}}

    async def scenario(store: KubernetesStore) -> None:
        await store.publish(source(accelerator="cuda", topology={"zone": "a"}, source_load=0.5))
        api_server.request("PATCH", path, label, content_type="application/merge-patch+json")
        await store.publish(source(topology={"rack": "b"}))
        await store.update("source", "a", _STALE, None, "")

    with_stores(scenario, new_store)

    found = api_server.request("GET", path)
    assert {"app.kubernetes.io/managed-by": "model-express", "team": "inference"} == found["metadata"]["labels"]
    assert {"rack": "b"} == found["spec"]["topology"]
    assert "accelerator" not in found["spec"]
    assert {"state": 3, "ready": False} == {key: found["status"][key] for key in ("state", "ready")}
    assert "load" not in found["status"]


def test_an_object_that_somebody_damaged_harms_no_other(
    api_server: KubeApiServer, namespace: str, new_store: NewStore
) -> None:
    """Lists leave it out and count it; the next publication of its publisher replaces it."""
    path = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}"
    merge = "application/merge-patch+json"

    async def scenario(store: KubernetesStore) -> None:
        for worker in ("a", "b", "c"):
            await store.publish(source(worker, worker.encode(), publisher="alice"))
        forged = {"spec": {"workerId": "other"}}
        api_server.request("PATCH", f"{path}/modelsources/{name_of('source', 'a')}", forged, content_type=merge)

        async def left_out() -> bool:
            return (await store.list(SourceQuery("source"))).unreadable == 1

        assert await eventually(left_out)
        assert ["b", "c"] == sorted(each.worker_id for each in (await store.list(SourceQuery("source"))).records)
        assert 0 == (await store.list(SourceQuery("another"))).unreadable
        with pytest.raises(UnreadableRecordError):
            await store.get("source", "a")
        with pytest.raises(NotPublisherError):
            await store.publish(source("a", publisher="bob"))
        await store.publish(source("a", publisher="alice"))
        assert await store.get("source", "a") is not None
        assert 0 == (await store.list(SourceQuery("source"))).unreadable

        [part] = [
            each["metadata"]["name"]
            for each in objects(api_server, namespace, "modelsourcecontents")
            if each["metadata"]["name"].startswith(name_of("source", "b"))
        ]
        other = {"data": base64.b64encode(b"other").decode()}
        api_server.request("PATCH", f"{path}/modelsourcecontents/{part}", other, content_type=merge)
        with pytest.raises(UnreadableRecordError):
            await store.get("source", "b")

    with_stores(scenario, new_store)


def test_parts_that_no_source_names_are_removed(
    api_server: KubeApiServer, namespace: str, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their server was killed between two writes. Those of sources stay."""
    monkeypatch.setattr("mx_kubernetes._store._ORPHAN_SECONDS", -60.0)
    monkeypatch.setattr("mx_kubernetes._store._SWEEP_SECONDS", 0.0)
    path = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/modelsourcecontents"
    orphan = {
        "apiVersion": "modelexpress.io/v1alpha1",
        "kind": "ModelSourceContent",
        "metadata": {"name": f"{name_of('source', 'x')}-0123456789-0"},
        "data": "eA==",
    }

    async def scenario(store: KubernetesStore) -> None:
        await store.publish(source())
        api_server.request("POST", path, orphan)
        await asyncio.sleep(0.1)
        await store.reap(0.05, 3600)
        assert await store.get("source", "a") is not None

    with_stores(scenario, new_store)

    [left] = objects(api_server, namespace, "modelsourcecontents")
    assert left["metadata"]["name"].startswith(name_of("source", "a"))


# -- opening -----------------------------------------------------------------------------------------------------------


def test_the_uri(api_server: KubeApiServer, namespace: str, tmp_path: Path) -> None:
    """Names the namespace; without one it is that of the context."""
    config = api_server.kubeconfig(tmp_path / "config", namespace)
    elsewhere = api_server.kubeconfig(tmp_path / "elsewhere", "default")

    async def publish(store: KubernetesStore) -> None:
        await store.publish(source())

    with_stores(publish, lambda: open_kubernetes(ModelURI.parse("kubernetes://"), {"KUBECONFIG": str(config)}))
    uri = ModelURI.parse(f"kubernetes://{namespace}")
    found = with_stores(
        lambda store: store.get("source", "a"), lambda: open_kubernetes(uri, {"KUBECONFIG": str(elsewhere)})
    )

    assert found is not None
    for wrong in ("kubernetes://ns/path", "kubernetes://user@ns", "kubernetes://ns?context=x"):
        with pytest.raises(InvalidURIError, match="has more than a namespace"):
            open_kubernetes(ModelURI.parse(wrong), {"KUBECONFIG": str(config)})


def test_a_pod_uses_its_own_account(api_server: KubeApiServer, namespace: str, tmp_path: Path) -> None:
    """Token, authority and namespace are in the files of the pod, the address in its variables."""
    rules = json.loads(files("mx_kubernetes").joinpath("rbac.json").read_text("utf-8"))["store"]["rules"]
    api_server.new_account(namespace, "server", rules)
    (tmp_path / "token").write_text(api_server.new_token(namespace, "server"))
    (tmp_path / "ca.crt").write_bytes(api_server.authority.read_bytes())
    (tmp_path / "namespace").write_text(f"{namespace}\n")
    port = api_server.url.rpartition(":")[2]
    variables = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}

    with_stores(lambda store: store.publish(source()), lambda: KubernetesStore(Kubernetes(variables, str(tmp_path))))

    assert 1 == len(objects(api_server, namespace, "modelsources"))


def test_a_certificate_of_another_authority_is_refused(
    api_server: KubeApiServer, namespace: str, tmp_path: Path
) -> None:
    """The token goes to the API server alone."""
    (tmp_path / "token").write_text("hush-hush")
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    (tmp_path / "namespace").write_text(namespace)
    port = api_server.url.rpartition(":")[2]
    variables = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}

    async def scenario(store: KubernetesStore) -> str:
        with pytest.raises(StoreUnavailableError) as raised:
            await store.check()
        return str(raised.value)

    said = with_stores(scenario, lambda: KubernetesStore(Kubernetes(variables, str(tmp_path))))

    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert "hush" not in said


def test_a_clock_that_is_wrong(
    api_server: KubeApiServer, namespace: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Is told once: the times of servers are of their own clocks."""
    path = api_server.kubeconfig(tmp_path / "config", namespace)
    api = Kubernetes({"KUBECONFIG": str(path)}, wall_clock=lambda: time.time() + 3600)

    async def scenario(store: KubernetesStore) -> None:
        for _ in range(3):
            await store.check()

    with_stores(scenario, lambda: KubernetesStore(api))

    [said] = [record.message for record in caplog.records if "clock" in record.message]
    assert said.startswith("the clock of this machine is 36")
    assert "ahead of that of the API server" in said


def test_without_an_api_server_the_error_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is served."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SettingsError, match=r"there is no file .*\.kube/config") as raised:
        open_kubernetes(ModelURI.parse("kubernetes://"), {})
    assert "KUBECONFIG" in str(raised.value)

    with pytest.raises(SettingsError, match="the pod has no token") as raised:
        open_kubernetes(ModelURI.parse("kubernetes://"), {"KUBERNETES_SERVICE_HOST": "127.0.0.1"})
    assert "automountServiceAccountToken" in str(raised.value)


def test_a_cluster_without_our_resources(api_server: KubeApiServer, tmp_path: Path) -> None:
    """The error names the namespace, the operation and what to apply; wrong credentials are not shown."""
    nothing = api_server.kubeconfig(tmp_path / "config", "no-such-namespace", token="hush-hush-hush")

    async def scenario(store: KubernetesStore) -> str:
        with pytest.raises(StoreUnavailableError) as raised:
            await store.list(SourceQuery())
        return str(raised.value)

    said = with_stores(scenario, lambda: open_kubernetes(ModelURI.parse("kubernetes://"), {"KUBECONFIG": str(nothing)}))

    assert "in the namespace no-such-namespace (401" in said
    assert "check the service account's token, or the kubeconfig" in said
    assert "hush" not in said
