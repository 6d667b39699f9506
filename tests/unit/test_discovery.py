"""Which discoveries are asked, and what becomes of what they say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from modelexpress_core import plugin as core
from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer, Skipped, Tier
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import PluginLoadError, SettingsError, UnavailableError, UnknownSchemeError
from modelexpress_core.hooks import hookimpl
from modelexpress_core.loader import Loader
from modelexpress_core.plugins import DISCOVERY, PluginManager
from modelexpress_core.providers import DiscoveryProvider, TransportProvider
from modelexpress_core.settings import from_env
from modelexpress_core.sources.discovery import find_candidates
from modelexpress_core.sources.metrics import SourceMetrics
from modelexpress_core.sources.settings import SELECTORS, DiscoverySettings, PublishingSettings
from modelexpress_core.uri import ModelURI

_URI = ModelURI.parse("memory://host/model")
_REQUEST = LoadRequest(_URI, SourceIdentity("acme/model"), worker_rank=1, reader="me")


def peer(worker_id: str, scheme: str = "nixl") -> Candidate:
    return Candidate(ModelURI(scheme, "server:8001", f"id/{worker_id}"), "test", Peer("id", worker_id, 1))


class Discovering:
    """A plugin with the discovery `test` and the transport `nixl`."""

    def __init__(self, answer: Callable[[LoadRequest], Any]) -> None:
        self.answer = answer
        self.requests: list[LoadRequest] = []
        self.closed = 0

    def candidates(self, request: LoadRequest) -> Any:
        self.requests.append(request)
        return self.answer(request)

    def close(self) -> None:
        self.closed += 1

    def open(self, uri: ModelURI, settings: Mapping[str, str]) -> Any:
        return self

    @hookimpl
    def mx_register_discoveries(self) -> list[DiscoveryProvider]:
        return [DiscoveryProvider("test", ("test",), self.open)]

    @hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        return [TransportProvider("mx-nixl", ("nixl",), self.open)]


def manager(*discovering: Any) -> PluginManager:
    made = PluginManager()
    for number, each in enumerate(discovering):
        made.register(each, name=f"mx-test-{number}")
    made.register(core, name="modelexpress-core")
    return made


def found(discovering: Any, request: LoadRequest = _REQUEST, **environ: str) -> list[str]:
    environ = environ or {"MX_DISCOVERY": "test://"}
    return [str(candidate.uri) for candidate in find_candidates(manager(discovering), environ, request)]


def raising(error: Exception) -> Callable[[LoadRequest], Any]:
    def answer(_request: LoadRequest) -> Any:
        raise error

    return answer


def test_discovered_peers_come_before_the_requested_uri() -> None:
    """The discovery gets the whole request, with the configured selector, and is closed."""
    discovering = Discovering(lambda _: [peer("w")])

    uris = found(discovering, MX_DISCOVERY="test://", MX_P2P_SOURCE_SELECTOR="random")

    assert ["nixl://server:8001/id/w", "memory://host/model"] == uris
    assert [attrs.evolve(_REQUEST, selector="random")] == discovering.requests
    assert 1 == discovering.closed


def test_a_reader_without_a_name_gets_one() -> None:
    """Readers with equal names would all read from one peer."""
    discovering = Discovering(lambda _: ())

    found(discovering, attrs.evolve(_REQUEST, reader=""))
    found(discovering, attrs.evolve(_REQUEST, reader="", worker_rank=2))

    first, second = (request.reader for request in discovering.requests)
    assert first
    assert first != second


def test_without_an_identity_no_discovery_is_used() -> None:
    """No variable is read: loads without an identity do not change."""
    discovering = Discovering(lambda _: [peer("w")])

    uris = found(discovering, LoadRequest(_URI), MX_DISCOVERY="test://", MX_P2P_SOURCE_SELECTOR="nonsense")

    assert ["memory://host/model"] == uris
    assert [] == discovering.requests


def test_a_peer_without_an_installed_transport_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """A debug message names it; a storage scheme is not used for peers."""
    others = [peer("w", "pigeon"), peer("v"), peer("u", "memory"), Candidate(ModelURI("pigeon", "x"), "test")]

    with caplog.at_level(logging.DEBUG):
        uris = found(Discovering(lambda _: others))

    assert ["nixl://server:8001/id/v", "memory://host/model"] == uris
    assert {logging.DEBUG} == {record.levelno for record in caplog.records}
    assert "no installed plugin handles pigeon" in caplog.text


def test_a_place_that_is_found_twice_is_tried_once() -> None:
    """It may come from two discoveries, or from one and the caller."""
    discovering = Discovering(lambda _: [peer("w"), peer("w"), Candidate(_URI, "test")])

    assert ["nixl://server:8001/id/w", "memory://host/model"] == found(discovering, MX_DISCOVERY="test://,test://")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (raising(UnavailableError("nobody there", hint="start it")), "nobody there"),
        (raising(ZeroDivisionError("oops")), "ZeroDivisionError: oops"),
        (lambda _: None, "TypeError"),
        (lambda _: ["nixl://server/id/w"], "it is no Candidate but a str"),
    ],
    ids=["an error", "a defect", "nothing", "no candidates"],
)
def test_a_failing_discovery_is_skipped(
    answer: Callable[[LoadRequest], Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names it and the reason; other candidates and the requested URI remain."""
    uris = found(Discovering(answer), MX_DISCOVERY="test://,static://", MX_STATIC_SOURCES="memory://mirror/model")

    assert ["memory://mirror/model", "memory://host/model"] == uris
    assert 1 == len(caplog.records)
    assert "test://" in caplog.text
    assert said in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda: Candidate("nixl://s/id/w"),  # type: ignore[arg-type]
        lambda: Candidate(_URI, "test", "w"),  # type: ignore[arg-type]
        lambda: Peer("id", 7),  # type: ignore[arg-type]
        lambda: Peer("id", "w", load="much"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_candidate_fails_in_its_constructor(make: Callable[[], object]) -> None:
    """The error occurs in the plugin, which is skipped, and not during ranking."""
    with pytest.raises((TypeError, ValueError)):
        make()
    assert [str(_URI)] == found(Discovering(lambda _: [make()]))


def test_a_load_given_as_text_becomes_a_number() -> None:
    """Tables and JSON may contain text."""
    assert 0.5 == Peer("id", "w", load="0.5").load  # type: ignore[arg-type]


def test_a_discovery_that_fails_to_close_keeps_its_candidates(caplog: pytest.LogCaptureFixture) -> None:
    """Its candidates are not lost."""

    class Clinging(Discovering):
        def close(self) -> None:
            reason = "no"
            raise RuntimeError(reason)

    assert ["nixl://server:8001/id/w", str(_URI)] == found(Clinging(lambda _: [peer("w")]))
    assert "closing the discovery test:// failed" in caplog.text


def test_an_unknown_discovery_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """The warning lists the installed ones and the next step."""
    assert ["memory://host/model"] == found(Discovering(lambda _: ()), MX_DISCOVERY="dns://workers")

    assert "no usable plugin handles the discovery scheme 'dns'" in caplog.text
    assert "server, static" in caplog.text


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({}, []),
        ({"MODEL_EXPRESS_URL": "127.0.0.1:1"}, ["server://"]),
        ({"MX_SERVER_ADDRESS": "127.0.0.1:1"}, ["server://"]),
        ({"MX_METADATA_BACKEND": "Redis"}, ["server://"]),
        ({"MX_METADATA_BACKEND": "kubernetes"}, ["server://"]),
        ({"MX_METADATA_BACKEND": "k8s-service", "MODEL_EXPRESS_URL": "x"}, ["k8s-service://"]),
        ({"MX_METADATA_BACKEND": "redis", "MX_DISCOVERY": "static://, other://x"}, ["static://", "other://x"]),
    ],
)
def test_which_discoveries_are_used(environ: dict[str, str], asked: list[str]) -> None:
    """MX_DISCOVERY, else MX_METADATA_BACKEND, else the server if its address is set, else none."""
    opened: list[str] = []

    class Recording(PluginManager):
        def open(self, kind: Any, uri: ModelURI, environ: Mapping[str, str]) -> Any:
            opened.append(f"{uri.scheme}://{uri.authority}")
            raise UnavailableError("not now")

    plugins = Recording()
    plugins.register(core, name="modelexpress-core")

    find_candidates(plugins, environ, _REQUEST)

    assert asked == opened


@pytest.mark.parametrize(
    ("environ", "fragments"),
    [
        ({"MX_P2P_SOURCE_SELECTOR": "best"}, ["MX_P2P_SOURCE_SELECTOR='best'", *SELECTORS]),
        ({"MX_METADATA_BACKEND": "etcd"}, ["MX_METADATA_BACKEND='etcd'", "redis", "k8s-service"]),
        ({"MX_DISCOVERY": "server"}, ["MX_DISCOVERY", "'server'", "server://"]),
        ({"MX_DISCOVERY": "server://a\nb"}, ["MX_DISCOVERY", "control character"]),
        ({"MX_DISCOVERY": "server://a:1/path"}, ["server://a:1/path", "server://host:port"]),
        ({"MX_DISCOVERY": "server://?tls=1"}, ["server://host:port?tls=1"]),
        ({"MX_DISCOVERY": "static://x"}, ["static://x", "MX_STATIC_SOURCES"]),
        ({"MX_DISCOVERY": "static://", "MX_STATIC_SOURCES": "s3:/b,://x,s3://b/m"}, ["s3:/b", "://x"]),
    ],
)
def test_invalid_settings_raise(environ: dict[str, str], fragments: list[str]) -> None:
    """They are not treated as a failing discovery, because the user's intention is unknown."""
    with pytest.raises(SettingsError) as raised:
        find_candidates(manager(), environ, _REQUEST)

    for fragment in fragments:
        assert fragment in str(raised.value)


def test_secrets_in_settings_are_hidden() -> None:
    """They appear neither in the shown values nor in messages."""
    secret = "hush-hush"
    environ = {"MX_DISCOVERY": "static://", "MX_STATIC_SOURCES": f"s3:/me:{secret}@b/m,https://h/m?sig={secret}"}

    with pytest.raises(SettingsError) as raised:
        find_candidates(manager(), environ, _REQUEST)

    assert secret not in str(raised.value)
    shown = from_env(DiscoverySettings, {"MX_DISCOVERY": f"server://me:{secret}@host"})
    assert secret not in repr(shown)


def test_static_sources_are_peers_and_checkpoints() -> None:
    """They are ordered by kind; the scheme shows which ones are peers."""
    uris = found(
        Discovering(lambda _: ()),
        MX_DISCOVERY="static://",
        MX_STATIC_SOURCES="memory://mirror/model, nixl://10.0.0.5:5555,/models/model",
    )

    assert ["nixl://10.0.0.5:5555", "memory://mirror/model", "file:///models/model", "memory://host/model"] == uris


def test_the_loader_finds_peers_for_requests_with_an_identity() -> None:
    """Other requests get no peers."""
    discovering = Discovering(lambda _: [peer("w")])
    loader = Loader({"MX_DISCOVERY": "test://"}, manager(discovering))

    assert _REQUEST.identity is not None
    identity = _REQUEST.identity.with_content_version("1")

    with_identity = loader.candidates(loader.request(_URI, identity=identity, worker_rank=1, reader="me"))
    without = loader.candidates(loader.request(_URI))

    assert ["nixl", "memory"] == [candidate.uri.scheme for candidate in with_identity]
    assert ["memory"] == [candidate.uri.scheme for candidate in without]
    assert [attrs.evolve(_REQUEST, identity=identity)] == discovering.requests


# -- why places are left out -------------------------------------------------------------------------------------------


def left_out(discovering: Any, request: LoadRequest = _REQUEST, **environ: str) -> dict[str, str]:
    """Reasons and next steps by place."""
    reported: list[Skipped] = []
    environ = {"MX_DISCOVERY": "test://", **environ}
    find_candidates(manager(discovering), environ, attrs.evolve(request, on_skipped=reported.append))
    return {each.place: f"{'; '.join(each.reasons)}: {each.hint}" for each in reported}


def test_a_transport_that_is_missing_is_the_reason() -> None:
    """With the command that installs it; the requested URI is no place that is left out."""
    others = [peer("w", "grpc"), peer("v")]

    [(place, reason)] = left_out(Discovering(lambda _: others)).items()

    assert "grpc://server:8001/id/w" == place
    assert "no usable plugin handles the transport scheme 'grpc'" in reason
    assert "pip install " in reason


def test_a_discovery_that_fails_is_a_place() -> None:
    """So that an empty list is not mistaken for a model that no worker holds."""
    failing = Discovering(raising(UnavailableError("nobody there", hint="start it")))
    defect = Discovering(raising(ZeroDivisionError("oops")))

    assert {"test://": "nobody there: start it"} == left_out(failing)
    assert "ZeroDivisionError: oops" in left_out(defect)["test://"]
    assert "no usable plugin" in left_out(failing, MX_DISCOVERY="other://")["other://"]


def test_a_discovery_says_what_it_leaves_out() -> None:
    """In a load nobody asks."""

    def answer(request: LoadRequest) -> list[Candidate]:
        request.skip("row 7", "it is of another zone", "set ZONE")
        return []

    assert {"row 7": "it is of another zone: set ZONE"} == left_out(Discovering(answer))
    assert ["memory://host/model"] == found(Discovering(answer))


def test_what_a_plugin_drops_from_the_ranking_is_reported() -> None:
    """It names the setting that disables plugins."""

    class Dropping(Discovering):
        @hookimpl
        def mx_rank_candidates(self, request: LoadRequest, candidates: Sequence[Candidate]) -> list[Candidate]:
            return [each for each in candidates if each.peer is None]

    [(place, reason)] = left_out(Dropping(lambda _: [peer("w")])).items()

    assert "nixl://server:8001/id/w" == place
    assert "MX_DISABLED_PLUGINS" in reason


# -- tiers that depend on the worker -----------------------------------------------------------------------------------


class Ranking:
    """A discovery that finds the workers of ``topologies``, over two transports.

    ``ranked`` ranks them by the function ``tier``, and ``even`` has the tier PEER.
    """

    def __init__(
        self, topologies: Mapping[str, Mapping[str, str]], tier: Callable[[Peer, Mapping[str, str]], Any]
    ) -> None:
        self._topologies = topologies
        self._tier = tier

    def candidates(self, request: LoadRequest) -> list[Candidate]:
        return [
            Candidate(ModelURI(scheme, name, f"id/{name}"), "test", Peer("id", name, topology=topology))
            for name, topology in self._topologies.items()
            for scheme in ("ranked", "even")
        ]

    def close(self) -> None:
        pass

    def open(self, uri: ModelURI, settings: Mapping[str, str]) -> Any:
        return self

    @hookimpl
    def mx_register_discoveries(self) -> list[DiscoveryProvider]:
        return [DiscoveryProvider("test", ("test",), self.open)]

    @hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        return [
            TransportProvider("mx-ranked", ("ranked",), self.open, tier=self._tier),
            TransportProvider("mx-even", ("even",), self.open, tier=Tier.PEER),
        ]


def test_a_transport_ranks_each_worker_by_what_it_publishes() -> None:
    """And by the variables of the load; a worker of which nothing is known comes after the others."""

    def tier(peer: Peer, environ: Mapping[str, str]) -> Tier:
        return Tier.FABRIC_PEER if peer.topology.get("rail") == environ["RAIL"] else Tier.OTHER_PEER

    ranking = Ranking({"near": {"rail": "1"}, "far": {"rail": "2"}}, tier)

    uris = found(ranking, MX_DISCOVERY="test://", RAIL="1", MX_P2P_SOURCE_SELECTOR="rendezvous_hash")

    assert "ranked://near/id/near" == uris[0]
    assert {"even://near/id/near", "even://far/id/far"} == set(uris[1:3])
    assert ["ranked://far/id/far", "memory://host/model"] == uris[3:]
    (record, _) = ranking.mx_register_transports()
    assert Tier.OTHER_PEER is record.tier_of(None, {"RAIL": "1"})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: 1 // 0, "ZeroDivisionError: "),
        (lambda: "best", "ValueError: 'best' is not a valid Tier"),
        (lambda: None, "ValueError: None is not a valid Tier"),
        (lambda: Tier.ORIGIN, "ValueError: the tier of a transport is FABRIC_PEER, PEER or OTHER_PEER, not ORIGIN"),
        (lambda: int("\n" * 999), "ValueError: invalid literal"),
    ],
)
def test_a_worker_that_cannot_be_ranked_is_the_last_one(
    answer: Callable[[], Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a stranger publishes ends no load; the warning is short, in one line, and names worker and plugin."""
    uris = found(Ranking({"odd": {}}, lambda peer, environ: answer()))

    assert ["even://odd/id/odd", "ranked://odd/id/odd", "memory://host/model"] == uris
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("ranked://odd/id/odd is tried after other workers, because mx-ranked cannot rank it: ")
    assert said in warning
    assert len(warning) < 400
    assert warning.isprintable()


def test_settings_of_a_ranking_that_are_wrong_are_reported() -> None:
    """They are the user's, not those of the worker."""

    def tier(peer: Peer, environ: Mapping[str, str]) -> Tier:
        message = "RAIL is wrong"
        raise SettingsError(message)

    with pytest.raises(SettingsError, match="RAIL is wrong"):
        found(Ranking({"w": {}}, tier))


# -- plugins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opened", "said"),
    [(object(), "no discovery"), (Discovering, "have you forgotten the ()?"), (None, "it has no candidates, close")],
)
def test_a_factory_that_returns_no_discovery_is_named(opened: Any, said: str) -> None:
    """When it is called, and not in the middle of a load."""

    class Plugin:
        @hookimpl
        def mx_register_discoveries(self) -> list[DiscoveryProvider]:
            return [DiscoveryProvider("mx-bad", ("bad",), lambda uri, settings: opened)]

    with pytest.raises(PluginLoadError) as raised:
        manager(Plugin()).open(DISCOVERY, ModelURI.parse("bad://"), {})

    assert said in str(raised.value)
    with pytest.raises(UnknownSchemeError):
        manager().open(DISCOVERY, ModelURI.parse("bad://"), {})


def test_a_record_may_name_several_settings_classes() -> None:
    """`mx settings` shows all of them."""
    classes = [cls for _, cls in manager().settings_classes()]

    assert DiscoverySettings in classes
    assert PublishingSettings in classes


# -- metrics -----------------------------------------------------------------------------------------------------------


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_peer_discovery_is_counted() -> None:
    """Loads for which a peer ranked first, usable peers, and the time of ranking."""
    names = {
        "mx_p2p_source_selections_total": {"policy": "random"},
        "mx_p2p_candidates_count": {"policy": "random", "stage": "usable"},
        "mx_p2p_candidates_sum": {"policy": "random", "stage": "usable"},
        "mx_p2p_source_selection_seconds_count": {"policy": "random"},
    }
    before = {name: value(name, **labels) for name, labels in names.items()}
    environ = {"MX_DISCOVERY": "test://", "MX_P2P_SOURCE_SELECTOR": "random"}

    found(Discovering(lambda _: [peer("w"), peer("v"), peer("u", "pigeon")]), **environ)
    found(Discovering(lambda _: ()), **environ)

    after = {name: value(name, **labels) for name, labels in names.items()}
    assert [1, 2, 2, 2] == [after[name] - before[name] for name in names]


def test_without_prometheus_nothing_is_counted() -> None:
    """And nothing fails; nor where the names are taken."""
    silent = SourceMetrics(None)
    registry = CollectorRegistry()
    SourceMetrics(registry)

    with silent.selecting("random"):
        silent.listed("random", "ok")
        silent.counted("random", "listed", 1)
        silent.selected("random")
    with pytest.raises(ValueError, match="Duplicated"):  # which source_metrics() takes for the existing client's
        SourceMetrics(registry)


def test_the_sequence_may_be_any() -> None:
    """A generator, say, that fails in the middle."""

    def answer(_request: LoadRequest) -> Sequence[Candidate]:
        yield peer("w")
        raise UnavailableError("the rest is lost")

    assert ["memory://host/model"] == found(Discovering(answer))
