"""`mx serve` with a configuration file, and with the variables that deployments have already."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from devtools.redis_server import RedisServer
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.server.cache import ModelCache
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.network import CLOSED_PORT
from tests.support.serving import Serving

_SECRET = "hunter2"

Start = Callable[..., Serving]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    """Writes a configuration; its path."""

    def config(text: str) -> str:
        path = tmp_path / "mx.yaml"
        path.write_text(text)
        return str(path)

    return config


def test_a_file_configures_the_server(start: Start, config: Callable[[str], str]) -> None:
    """By flag and by variable; the flags that the test gives win over it."""
    path = config("host: 203.0.113.1\nport: 1\nlog:\n  format: json\n")

    by_flag = start("--config", path)
    by_variable = start(MX_SERVER_CONFIG=path)

    for serving in (by_flag, by_variable):
        with ServerClient(serving.url) as client:
            assert "ok" == client.health().status
        _, said = serving.ended()
        assert said.startswith("{")
        assert '"authentication: off; TLS: no"' in said


def test_a_wrong_file_stops_the_server(mx: Command, config: Callable[[str], str]) -> None:
    """With one message and exit code 1, whether it would serve or check."""
    path = config(f"prot: 1\nmetadata: [{_SECRET}]\n")

    for arguments in (("serve",), ("serve", "--check")):
        done = mx(*arguments, "--config", path, environ={"MX_GC_TIMEOUT_SECS": "-1"})

        assert 1 == done.returncode
        for part in ("mx.yaml, line 1: nothing is called prot", "mx.yaml, line 2: metadata", "MX_GC_TIMEOUT_SECS='-1'"):
            assert part in done.stderr
        assert "Traceback" not in done.stderr
        assert _SECRET not in done.stderr
        assert not done.stdout


def test_checking(mx: Command, config: Callable[[str], str]) -> None:
    """Shows every value and where it came from, without secrets; a store that nobody offers fails it."""
    path = config("port: 9000\nlog: {level: warning}\n")
    environ = {"MX_METADATA_BACKEND": "redis", "REDIS_URL": f"redis://:{_SECRET}@redis", "MX_DRAIN_SECONDS": "3"}

    done = mx("--log-level", "debug", "serve", "--check", "--config", path, "--host", "127.0.0.1", environ=environ)
    unknown = mx("serve", "--check", environ={"MX_METADATA_URI": "etcd://host"})
    wrong = mx("serve", "--check", environ={"MX_METADATA_BACKEND": "server"})
    no_uri = mx("serve", "--check", environ={"MX_METADATA_URI": f"redis:/:{_SECRET}@h"})

    assert 0 == done.returncode, done.stderr
    shown = done.stdout.splitlines()
    assert "host = 127.0.0.1 (from --host)" in shown
    assert f"port = 9000 (from {path}, line 1)" in shown
    assert "metrics_port = 9401" in shown
    assert "metadata = redis://***@redis (from MX_METADATA_BACKEND, REDIS_URL)" in shown
    assert "drain_seconds = 3.0 (from MX_DRAIN_SECONDS)" in shown
    assert "log.level = debug (from --log-level)" in shown
    assert _SECRET not in done.stdout + done.stderr
    assert (1, True) == (unknown.returncode, "metadata store scheme 'etcd'" in unknown.stderr)
    assert (1, True) == (no_uri.returncode, "metadata (from MX_METADATA_URI): the URI has fewer than" in no_uri.stderr)
    assert _SECRET not in no_uri.stderr
    assert (1, True) == (wrong.returncode, "there are memory, redis, kubernetes" in wrong.stderr)


def test_all_that_is_wrong_is_one_message(mx: Command, config: Callable[[str], str]) -> None:
    """What stands in the file, in variables, and what does not fit together."""
    path = config("port: many\nauth: {mode: mtls}\n")

    done = mx(
        "serve",
        "--check",
        "--config",
        path,
        environ={"MX_METADATA_URI": f"redis:{_SECRET}@host:6379/0", "MX_DRAIN_SECONDS": "1e306"},
    )
    backend = mx("serve", environ={"MX_METADATA_BACKEND": "etcd", "MX_GC_TIMEOUT_SECS": "-1"})
    path_of_none = mx("serve", "--metadata", f"redis:{_SECRET}@host:6379")

    for part in (
        "line 1: port: 'many': expected a whole number",
        "MX_AUTH_MODE is mtls, and MX_TLS_CA_PATH and MX_TLS_CERT_PATH are not set",
        "metadata (from MX_METADATA_URI): the URI has fewer than two slashes after its scheme: '***@host:6379/0'",
        "MX_DRAIN_SECONDS='1e306': expected a number of seconds of at most ten years",
    ):
        assert part in done.stderr
    assert _SECRET not in done.stderr
    for part in ("there are memory, redis, kubernetes", "MX_GC_TIMEOUT_SECS='-1'"):
        assert part in backend.stderr
    assert "metadata (from --metadata): no URI (the value is not shown)" in path_of_none.stderr
    assert _SECRET not in path_of_none.stderr
    assert (1, 1, 1) == (done.returncode, backend.returncode, path_of_none.returncode)


def test_checking_looks_at_files(mx: Command, config: Callable[[str], str], tmp_path: Path) -> None:
    """All that cannot be used are named, with the reason; those that can be are no matter."""
    files = {name: str(tmp_path / name) for name in ("cert", "key", "tokens", "ca")}
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    (tmp_path / "tokens").write_text(f"alice:{'a' * 32}\n")
    (tmp_path / "ca").write_text("nothing")
    pair = {"MX_TLS_CERT_PATH": files["cert"], "MX_TLS_KEY_PATH": files["key"]}
    token = {"MX_AUTH_MODE": "token", "MX_AUTH_TOKENS_PATH": files["tokens"]}

    good = mx("serve", "--check", environ={**pair, **token})
    bad = mx(
        "serve", "--check", environ={**pair, "MX_TLS_KEY_PATH": files["cert"], **token, "MX_AUTH_TOKENS_PATH": "/n"}
    )
    authority = mx("serve", "--check", environ={"MX_TLS_CA_PATH": files["ca"]})

    assert 0 == good.returncode, good.stderr
    assert (1, "") == (bad.returncode, bad.stdout)
    for part in ("MX_TLS_CERT_PATH and MX_TLS_KEY_PATH name", "MX_AUTH_TOKENS_PATH names cannot be read: /n"):
        assert part in bad.stderr
    assert (1, True) == (authority.returncode, "MX_TLS_CA_PATH names has no certificates" in authority.stderr)
    assert "Traceback" not in bad.stderr + authority.stderr


def test_an_unknown_mode_of_authentication(mx: Command, config: Callable[[str], str]) -> None:
    """One message says which are installed, before anything is served, wherever the mode was set."""
    path = config("auth: {mode: kerberos}\n")

    for arguments, environ in (
        (("--check",), {"MX_AUTH_MODE": "kerberos"}),
        (("--check", "--config", path), {}),
        (("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--config", path), {}),
    ):
        done = mx("serve", *arguments, environ=environ)

        assert (1, "") == (done.returncode, done.stdout)
        said = " ".join(done.stderr.split())
        assert "MX_AUTH_MODE is 'kerberos': no usable plugin offers the authenticator 'kerberos'" in said
        assert "installed: kubernetes, mtls, token" in said


def test_tokens_without_a_mode_are_no_setting(mx: Command, config: Callable[[str], str]) -> None:
    """Who names a file of tokens means that others are refused: `off`, said or not, would answer everybody."""
    for path, environ in (
        (config("{}\n"), {"MX_AUTH_TOKENS_PATH": "/tokens"}),
        (config("auth: {mode: off, tokens: /tokens}\n"), {}),
    ):
        done = mx("serve", "--check", "--config", path, environ=environ)

        assert 1 == done.returncode
        assert "MX_AUTH_TOKENS_PATH is set, and MX_AUTH_MODE is off: everybody would be answered" in done.stderr
        assert "set MX_AUTH_MODE=token, or unset MX_AUTH_TOKENS_PATH" in done.stderr


@pytest.mark.parametrize(
    "environ",
    [
        {"MX_METADATA_URI": f"redis:{_SECRET}@host:6379"},
        {"MX_METADATA_BACKEND": "redis", "REDIS_URL": f"redis:{_SECRET}@host:6379/0"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"collector:{_SECRET}@host:4317"},
    ],
)
@pytest.mark.parametrize("arguments", [("serve", "--check"), ("settings",), ("settings", "--json")])
def test_what_lacks_its_slashes_is_not_told(mx: Command, arguments: tuple[str, ...], environ: dict[str, str]) -> None:
    """It would be taken for a path, which is shown."""
    done = mx(*arguments, environ=environ)

    assert _SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "OTEL" in str(environ) or arguments[0] == "settings" or 1 == done.returncode


@pytest.mark.parametrize("alone", ["MX_TLS_CERT_PATH", "MX_TLS_KEY_PATH"])
def test_settings_are_listed_where_some_do_not_fit_together(mx: Command, alone: str) -> None:
    """With a mark at those that are concerned."""
    done = mx("settings", environ={alone: "/x.pem", "MX_CONCURRENCY": "4"})

    assert 1 == done.returncode
    for line in ("MX_CONCURRENCY = 4 (from MX_CONCURRENCY)", f"{alone} = *** (from {alone}) cannot be used"):
        assert line in done.stdout.splitlines()
    assert ["MX_TLS_CERT_PATH", "MX_TLS_KEY_PATH"] == [
        line.split()[0] for line in done.stdout.splitlines() if line.endswith("cannot be used")
    ]
    assert 1 == done.stderr.count("a certificate and its key belong together")


@pytest.mark.parametrize("password", [f"{_SECRET}/x", f"x/{_SECRET}", f"x?{_SECRET}", f"{_SECRET}#", f"a@{_SECRET}/b"])
@pytest.mark.parametrize("arguments", [("serve",), ("serve", "--check"), ("settings",)])
def test_a_password_that_is_not_encoded_is_not_told(mx: Command, arguments: tuple[str, ...], password: str) -> None:
    """It would be taken for a host or a path, which are shown."""
    environ = {"MX_METADATA_BACKEND": "redis", "REDIS_URL": f"redis://:{password}@h"}

    done = mx(*arguments, environ=environ)

    assert _SECRET not in done.stdout + done.stderr
    assert (arguments == ("settings",)) or "percent-encode" in done.stderr
    assert (0 if arguments == ("settings",) else 1) == done.returncode


def test_the_variables_of_existing_deployments(start: Start) -> None:
    """A backend with a host or with a URL is the Redis that a URI names; a URI wins over them."""
    identity = SourceIdentity("acme/model")
    with RedisServer() as redis:
        servers = [
            start(MX_METADATA_BACKEND="redis", MX_REDIS_HOST="127.0.0.1", MX_REDIS_PORT=str(redis.port)),
            start(MX_METADATA_BACKEND="redis", REDIS_URL=redis.url, MX_REDIS_PORT="1"),
            start(MX_METADATA_URI=redis.url),
            start(MX_METADATA_BACKEND="redis", REDIS_URL=redis.url, MX_METADATA_URI="memory://"),
        ]
        found = []
        with ServerClient(servers[0].url) as client:
            assert client.publish(identity, p2p_pb2.WorkerMetadata(), "w").success
        for serving in servers:
            with ServerClient(serving.url) as client:
                found.append(len(client.list_sources()))

    assert [1, 1, 1, 0] == found


def test_a_password_in_a_url_is_not_told(start: Start) -> None:
    """Not where the server says where its metadata is, nor later."""
    with RedisServer("--requirepass", _SECRET) as redis:
        serving = start(
            MX_METADATA_BACKEND="redis",
            REDIS_URL=f"redis://:{_SECRET}@127.0.0.1:{redis.port}",
            MODEL_EXPRESS_LOG_LEVEL="debug",
            MX_LOG_FORMAT="json",
        )
        assert f"redis://***@127.0.0.1:{redis.port}" == serving.metadata
        with ServerClient(serving.url) as client:
            assert [] == list(client.list_sources())
        _, said = serving.ended()

    assert "ListSources" in said
    assert _SECRET not in said


@pytest.mark.slow
def test_checking_finds_all_that_stops_a_server(mx: Command, config: Callable[[str], str], tmp_path: Path) -> None:
    """Whatever ``mx serve`` refuses, ``mx serve --check`` refuses with the same reason."""
    here = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0")
    plugins = tmp_path / "plugins"
    for name, hook, record in (
        ("wrong-service", "mx_register_server_services", "ServerServiceProvider('a.B', lambda context: 1 / 0)"),
        ("same-service", "mx_register_server_services", "ServerServiceProvider('model_express.api.ApiService', print)"),
        ("wrong-store", "mx_register_metadata_stores", "MetadataStoreProvider('w', ('wrong',), lambda *_: 1 / 0)"),
    ):
        module = name.replace("-", "_")
        info = plugins / name / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[modelexpress.plugins]\n{name} = {module}\n")
        (plugins / name / f"{module}.py").write_text(
            "from modelexpress_core.hooks import hookimpl\n"
            "from modelexpress_core.providers import MetadataStoreProvider, ServerServiceProvider\n"
            f"@hookimpl\ndef {hook}():\n    return [{record}]\n"
        )
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as listening, ModelCache(tmp_path / "locked", environ={}):
        taken = str(listening.getsockname()[1])
        refused = [
            (("--port", taken), {}, "MODEL_EXPRESS_SERVER_PORT"),
            (("--metrics-port", taken), {}, "MODEL_EXPRESS_SERVER_METRICS_PORT"),
            (("--health-port", taken), {}, "MODEL_EXPRESS_HEALTH_PORT"),
            (("--host", "192.0.2.1"), {}, "cannot listen on 192.0.2.1"),
            (("--host", "no.such.host.invalid"), {}, "cannot listen on no.such.host.invalid"),
            (("--metadata", "etcd://host"), {}, "metadata store scheme 'etcd'"),
            (("--metadata", "wrong://host"), {"PYTHONPATH": str(plugins / "wrong-store")}, "ZeroDivisionError"),
            ((), {"PYTHONPATH": str(plugins / "wrong-service")}, "a.B"),
            ((), {"PYTHONPATH": str(plugins / "same-service")}, "model_express.api.ApiService"),
            (("--config", str(tmp_path / "none")), {}, "cannot be read"),
            ((), {"MX_AUTH_MODE": "token", "MX_AUTH_TOKENS_PATH": "/none"}, "cannot be read: /none"),
            ((), {"MX_METRICS_TOKEN_PATH": "/none"}, "MX_METRICS_TOKEN_PATH"),
            ((), {"MX_TLS_CERT_PATH": "/none", "MX_TLS_KEY_PATH": "/none"}, "/none"),
            (("--cache-dir", str(tmp_path / "file")), {}, str(tmp_path / "file")),
            (("--cache-dir", str(tmp_path / "locked")), {}, "another server uses the cache"),
        ]
        for options, environ, words in refused:
            served = mx("serve", *here, *options, environ=environ)
            checked = mx("serve", "--check", *here, *options, environ=environ)

            assert (1, "") == (checked.returncode, checked.stdout), (options, environ, checked.stderr)
            assert 1 == served.returncode, (options, environ, served.stderr)
            for done in (served, checked):
                assert words in done.stderr, (options, environ, done.stderr)
                assert "Traceback" not in done.stderr


def test_checking_opens_the_cache(mx: Command, tmp_path: Path) -> None:
    """And releases it: a server can start afterwards."""
    here = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--cache-dir", str(tmp_path / "cache"))

    done = mx("serve", "--check", *here)

    assert 0 == done.returncode, done.stderr
    assert f"cache.directory = {tmp_path / 'cache'} (from --cache-dir)" in " ".join(done.stdout.split())
    with ModelCache(tmp_path / "cache", environ={}):
        pass


def test_checking_finds_two_ports_that_are_one(mx: Command) -> None:
    """The second of them could not be listened on."""
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = str(once.getsockname()[1])

    done = mx("serve", "--check", "--host", "127.0.0.1", "--port", port, "--metrics-port", port)

    assert 1 == done.returncode
    assert (
        f"MODEL_EXPRESS_SERVER_METRICS_PORT is {port}, which is the port of MODEL_EXPRESS_SERVER_PORT, too"
        in done.stderr
    )


def test_checking_warns_of_a_store_that_does_not_answer(mx: Command) -> None:
    """A server would start, and wait for it."""
    store = f"redis://127.0.0.1:{CLOSED_PORT}"

    done = mx("serve", "--check", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--metadata", store)

    assert 0 == done.returncode, done.stderr
    assert "the metadata store does not answer" in done.stderr
    assert "port = 0 (from --port)" in done.stdout


def test_checking_serves_nothing_and_changes_nothing(mx: Command, start: Start) -> None:
    """Beside a server with the same store."""
    with RedisServer() as redis, ServerClient(start(MX_METADATA_URI=redis.url).url) as client:
        client.publish(SourceIdentity("acme/model"), p2p_pb2.WorkerMetadata(), "w")

        done = mx("serve", "--check", "--port", "0", "--metrics-port", "0", "--metadata", redis.url)

        assert (0, "") == (done.returncode, done.stderr)
        assert 1 == len(client.list_sources())


def test_a_security_mode_that_contradicts_ours(mx: Command) -> None:
    """Nobody is let in who was to be kept out: the server does not start."""
    enforce = {"MODEL_EXPRESS_SECURITY_MODE": "enforce"}

    contradicted = mx("serve", "--check", environ={**enforce, "MX_AUTH_MODE": "off"})
    unfinished = mx("serve", "--check", environ=enforce)
    unknown = mx("serve", "--check", environ={"MODEL_EXPRESS_SECURITY_MODE": "permissive"})

    said = "auth.mode is off (from MX_AUTH_MODE), and MODEL_EXPRESS_SECURITY_MODE is enforce, which means kubernetes"
    assert (1, True) == (contradicted.returncode, said in " ".join(contradicted.stderr.split()))
    assert (1, True) == (unfinished.returncode, "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES" in unfinished.stderr)
    assert (1, True) == (unknown.returncode, "MODEL_EXPRESS_SECURITY_MODE" in unknown.stderr)
