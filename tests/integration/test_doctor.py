"""``mx doctor`` against real sockets, TLS, proxies and a real S3 server: which step fails, and what it says."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from devtools.seaweedfs import SeaweedFS
from modelexpress_core.doctor import STEPS, Step, can_load, diagnose
from modelexpress_core.errors import UnsupportedError
from modelexpress_core.plugins import PluginManager
from modelexpress_core.storage.memory import MemoryStorage
from tests.support import lookout
from tests.support.checkpoints import pattern
from tests.support.network import CLOSED_PORT

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Serve = Callable[..., int]

LOCAL = ("name", "connection", "tls", "clock", "credentials")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_bundle(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a web server that answers HEAD alone, encrypted with ``certificate``, its clock ``ahead`` by seconds."""
    with contextlib.ExitStack() as stack:

        def serve(certificate: trustme.LeafCert | None = None, *, ahead: float = 0, dated: bool = True) -> int:
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_HEAD(self) -> None:
                    self.send_response_only(403)
                    if dated:
                        self.send_header("Date", self.date_time_string(time.time() + ahead))
                    self.end_headers()

                def log_message(self, *_: object) -> None:
                    pass

            class Server(http.server.ThreadingHTTPServer):
                def handle_error(self, *_: object) -> None:  # a client that does not trust us is no fault of ours
                    pass

            server = Server(("127.0.0.1", 0), Handler)
            if certificate is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                certificate.configure_cert(context)
                server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return int(server.server_address[1])

        yield serve


@pytest.fixture
def proxy() -> Iterator[Callable[[bytes], int]]:
    """Starts a proxy that answers the first CONNECT with a status line and, where that is 200, passes bytes on."""
    with contextlib.ExitStack() as stack:

        def start(status: bytes) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def answer() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        client, _ = listener.accept()
                        threading.Thread(target=_tunnel, args=(client, status), daemon=True).start()

            thread = threading.Thread(target=answer)
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield start


def _tunnel(client: socket.socket, status: bytes) -> None:
    with client, contextlib.suppress(OSError):
        head = b""
        while b"\r\n\r\n" not in head:
            part = client.recv(4096)
            if not part:
                return
            head += part
        client.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")
        if not status.startswith(b"200"):
            return
        # Whatever name was asked for, it leads to this machine.
        port = int(head.split()[1].rpartition(b":")[2])
        with socket.create_connection(("127.0.0.1", port)) as server:
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join(5)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def examine(sharded: Path) -> Callable[..., dict[str, Step]]:
    """The steps to the generated checkpoint behind the lookout plugin, by name."""

    def examine(uri: str = "", **variables: object) -> dict[str, Step]:
        environ = {f"LOOKOUT_{name.upper()}": str(value) for name, value in variables.items()}
        plugins = PluginManager.discover({})
        plugins.register(lookout, name="mx-lookout", version="1.0")
        steps = list(diagnose(uri or f"lookout://{sharded}", environ=environ, plugins=plugins, timeout_seconds=0.5))
        assert list(STEPS) == [step.name for step in steps]
        return {step.name: step for step in steps}

    return examine


def statuses(steps: dict[str, Step], *names: str) -> list[str]:
    return [steps[name].status for name in names or STEPS]


# -- the network -------------------------------------------------------------------------------------------------------


def test_all_is_well_over_tls(
    examine: Callable[..., dict[str, Step]], serve: Serve, authority: trustme.CA, ca_bundle: str
) -> None:
    """Every step is ok, and says what it saw: addresses, times, the certificate, the clock, the credentials."""
    port = serve(authority.issue_cert("localhost"))

    steps = examine(host="localhost", port=port, tls=1, ca=ca_bundle, key="private-42")

    assert ["ok"] * len(STEPS) == statuses(steps), steps
    assert can_load(steps.values())
    assert "127.0.0.1" in steps["name"].facts["addresses"]
    assert steps["connection"].facts["milliseconds"]["127.0.0.1"] > 0
    tls = steps["tls"]
    assert ("TLSv1.3", ["localhost"], True) == tuple(tls.facts[key] for key in ("version", "names", "trusted"))
    assert tls.facts["issuer"] in tls.seen
    assert tls.facts["not_after"][:10] in tls.seen
    assert ca_bundle in tls.seen
    assert abs(steps["clock"].facts["seconds_ahead"]) < 2
    assert "key ...42, from LOOKOUT_KEY" == steps["credentials"].seen
    assert 65536 == steps["read"].facts["bytes"]
    assert 17 == steps["checkpoint"].facts["tensors"]


def test_an_address_needs_no_looking_up_and_a_plain_connection_no_tls(
    examine: Callable[..., dict[str, Step]], serve: Serve
) -> None:
    """Both steps are skipped with the reason, and the others are taken."""
    steps = examine(host="127.0.0.1", port=serve())

    assert ("skipped", "127.0.0.1 is an address") == (steps["name"].status, steps["name"].seen)
    assert ("skipped", "connections are not encrypted") == (steps["tls"].status, steps["tls"].seen)
    assert ["ok"] * 6 == statuses(steps, "connection", "clock", "credentials", "listing", "read", "checkpoint")


def test_a_name_that_is_unknown(examine: Callable[..., dict[str, Step]]) -> None:
    """The variable that names the host is named; the storage is asked all the same, for it may know another way."""
    steps = examine(host="no-such-host.invalid", port=443, tls=1)

    name = steps["name"]
    assert ("failed", "could not look up no-such-host.invalid: no such name") == (name.status, name.seen)
    assert (name.hint or "").startswith("check LOOKOUT_HOST, which names the host")
    assert "misspelt" in (name.cause or "")
    assert ["skipped"] * 3 == statuses(steps, "connection", "tls", "clock")
    assert ["ok"] * 4 == statuses(steps, "credentials", "listing", "read", "checkpoint")
    assert can_load(steps.values())


def test_a_port_that_refuses(examine: Callable[..., dict[str, Step]]) -> None:
    """Nothing listens: what needs a connection is skipped, credentials are looked at all the same."""
    steps = examine(port=CLOSED_PORT, host="127.0.0.1")

    connection = steps["connection"]
    assert ("failed", "UnavailableError") == (connection.status, connection.error)
    assert f"could not connect to 127.0.0.1:{CLOSED_PORT}: Connection refused" == connection.seen
    assert "nothing listens" in (connection.cause or "")
    assert "LOOKOUT_HOST" in (connection.hint or "")
    assert ["skipped"] * 5 == statuses(steps, "tls", "clock", "listing", "read", "checkpoint")
    assert "ok" == steps["credentials"].status
    assert not can_load(steps.values())


def test_a_port_that_drops_what_it_gets(examine: Callable[..., dict[str, Step]]) -> None:
    """A connection that does not come about costs the timeout once, not minutes."""
    with socket.socket() as listener, contextlib.ExitStack() as queued:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):  # a full queue: the kernel drops what comes after
            sock = queued.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        begun = time.monotonic()

        steps = examine(port=address[1])

    assert time.monotonic() - begun < 5
    connection = steps["connection"]
    assert ("failed", "DeadlineError") == (connection.status, connection.error)
    assert "no answer within 0.5 s" in connection.seen
    assert "firewall" in (connection.cause or "")


def test_a_port_that_is_silent_where_tls_belongs(examine: Callable[..., dict[str, Step]]) -> None:
    """The handshake ends at the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        steps = examine(port=silent.getsockname()[1], tls=1)

    assert ("ok", "failed", "skipped") == tuple(statuses(steps, "connection", "tls", "clock"))
    assert "DeadlineError" == steps["tls"].error
    assert "does not speak TLS" in (steps["tls"].cause or "")


def test_a_port_that_is_not_encrypted_where_tls_belongs(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """The usual slip, https for http, is named."""
    steps = examine(port=serve(), tls=1)

    assert "failed" == steps["tls"].status
    assert "not encrypted" in (steps["tls"].cause or "")
    assert "http://" in (steps["tls"].hint or "")


@pytest.mark.parametrize(
    ("issued", "trusted", "seen", "cause"),
    [
        ({"not_after": dt.datetime(2021, 1, 1, tzinfo=dt.timezone.utc)}, True, "has expired", "renewed"),
        ({}, False, "is not trusted", "an authority of your own"),
        ({"name": "elsewhere.example"}, True, "is for another host", "not one that the certificate has"),
    ],
)
def test_a_certificate_that_will_not_do(
    issued: dict[str, object],
    trusted: bool,
    seen: str,
    cause: str,
    examine: Callable[..., dict[str, Step]],
    serve: Serve,
    authority: trustme.CA,
    ca_bundle: str,
) -> None:
    """What is wrong with it, whose it is and when it is valid are told, though nothing trusts it."""
    options = {**issued}
    host = str(options.pop("name", "localhost"))
    other = trustme.CA()
    before = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)
    extra = {"not_before": before, **options} if "not_after" in options else {}
    port = serve((authority if trusted else other).issue_cert(host, **extra))  # type: ignore[arg-type]

    steps = examine(host="localhost", port=port, tls=1, ca=ca_bundle)

    tls = steps["tls"]
    assert ("failed", "UnavailableError", False) == (tls.status, tls.error, tls.facts["trusted"])
    assert seen in tls.seen
    assert f"{ca_bundle}, which LOOKOUT_CA names" in tls.seen
    assert cause in (tls.cause or "")
    assert ([host], "TLSv1.3") == (tls.facts["names"], tls.facts["version"])
    assert (int(tls.facts["days_left"]) < 0) == ("not_after" in issued)
    assert "skipped" == steps["clock"].status


def test_authorities_that_are_not_there(
    examine: Callable[..., dict[str, Step]], serve: Serve, authority: trustme.CA, tmp_path: Path
) -> None:
    """The file is named, and the variable that names it."""
    port = serve(authority.issue_cert("localhost"))
    missing = tmp_path / "missing.pem"

    steps = examine(host="localhost", port=port, tls=1, ca=missing)

    assert "failed" == steps["tls"].status
    assert f"could not read the authorities in {missing}: there is no such file" in steps["tls"].seen
    assert "correct LOOKOUT_CA" == steps["tls"].hint


def test_a_certificate_that_ends_soon_is_noted(
    examine: Callable[..., dict[str, Step]], serve: Serve, authority: trustme.CA, ca_bundle: str
) -> None:
    """It works today."""
    end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=3)
    port = serve(authority.issue_cert("localhost", not_after=end))

    steps = examine(host="localhost", port=port, tls=1, ca=ca_bundle)

    assert ("noted", 2) == (steps["tls"].status, steps["tls"].facts["days_left"])
    assert can_load(steps.values())


def test_a_clock_that_is_wrong_is_noted(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """By how much, in which direction, and what to do."""
    steps = examine(port=serve(ahead=600))

    clock = steps["clock"]
    assert "noted" == clock.status
    assert -602 < clock.facts["seconds_ahead"] < -598
    assert "behind the server's" in clock.seen
    assert "timedatectl" in clock.seen


def test_a_server_without_a_clock(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """Not every server says what time it is; that is no fault."""
    steps = examine(port=serve(dated=False))

    assert "skipped" == steps["clock"].status
    assert can_load(steps.values())


# -- proxies -----------------------------------------------------------------------------------------------------------


def test_through_a_proxy(
    examine: Callable[..., dict[str, Step]],
    serve: Serve,
    proxy: Callable[[bytes], int],
    authority: trustme.CA,
    ca_bundle: str,
) -> None:
    """The proxy is connected to, and said to be; TLS and clock are the server's, whose name is unknown here."""
    port = serve(authority.issue_cert("weights.invalid"))
    proxy_port = proxy(b"200 OK")

    steps = examine(host="weights.invalid", port=port, tls=1, ca=ca_bundle, proxy=f"http://localhost:{proxy_port}")

    assert ["ok"] * len(STEPS) == statuses(steps), steps
    assert f"weights.invalid is left to the proxy localhost:{proxy_port}; localhost is" in steps["name"].seen
    assert f"connected to the proxy 127.0.0.1:{proxy_port}" in steps["connection"].seen
    assert ["weights.invalid"] == steps["tls"].facts["names"]


@pytest.mark.parametrize(
    ("status", "outcome", "words"),
    [
        (b"403 Forbidden", "failed", "the proxy says 403 Forbidden"),
        (b"407 Proxy Authentication Required", "skipped", "the proxy asks for a name and a password"),
    ],
)
def test_a_proxy_that_lets_nothing_through(
    status: bytes, outcome: str, words: str, examine: Callable[..., dict[str, Step]], proxy: Callable[[bytes], int]
) -> None:
    """A refusal is a failure; a proxy that wants a password is not told one, so that step is skipped."""
    steps = examine(host="weights.invalid", port=443, tls=1, proxy=f"http://127.0.0.1:{proxy(status)}")

    assert outcome == steps["tls"].status
    assert words in steps["tls"].seen


def test_a_proxy_that_is_down(examine: Callable[..., dict[str, Step]]) -> None:
    """Its address and port are in the message, and the hint is about the proxy; a password in its URL is not shown."""
    steps = examine(host="weights.invalid", port=443, proxy=f"http://user:secret@127.0.0.1:{CLOSED_PORT}")

    assert f"could not connect to the proxy 127.0.0.1:{CLOSED_PORT}" in steps["connection"].seen
    assert "proxy" in (steps["connection"].hint or "")
    assert "secret" not in repr(steps)


def test_a_proxy_of_another_kind(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """It is connected to, and not looked into."""
    steps = examine(host="weights.invalid", port=443, tls=1, proxy=f"socks5://127.0.0.1:{serve()}")

    assert ("ok", "skipped", "skipped") == tuple(statuses(steps, "connection", "tls", "clock"))
    assert "socks5" in steps["tls"].seen


# -- the storage -------------------------------------------------------------------------------------------------------


def test_credentials_that_cannot_be_had(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """The storage's own cause and next step are shown."""
    steps = examine(port=serve(), denied="credentials")

    credentials = steps["credentials"]
    assert ("failed", "AccessDeniedError") == (credentials.status, credentials.error)
    assert ("could not credentials: not allowed", "a rule", "ask the owner") == (
        credentials.seen,
        credentials.cause,
        credentials.hint,
    )


def test_a_reader_who_may_not_list(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """Legitimate: it is noted, and the checkpoint is found by its usual names."""
    steps = examine(port=serve(), denied="list")

    assert ["noted", "ok", "ok"] == statuses(steps, "listing", "read", "checkpoint")
    assert "not allowed" in steps["listing"].seen
    assert 17 == steps["checkpoint"].facts["tensors"]


def test_a_reader_who_may_do_nothing(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """The listing fails with the reason, and what needs it is skipped."""
    steps = examine(port=serve(), denied="list,read")

    assert ["failed", "skipped", "skipped"] == statuses(steps, "listing", "read", "checkpoint")
    assert ("AccessDeniedError", "ask the owner") == (steps["listing"].error, steps["listing"].hint)


def test_a_reader_who_may_only_list(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """Reading fails, and with it opening."""
    steps = examine(port=serve(), denied="read")

    assert ["ok", "failed", "failed"] == statuses(steps, "listing", "read", "checkpoint")
    assert not can_load(steps.values())


def test_a_storage_that_has_gone_silent(examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """It costs its time once in listing and once in closing, and no more."""
    begun = time.monotonic()

    steps = examine(port=serve(), silent="list,close")

    assert time.monotonic() - begun < 5
    assert ("failed", "DeadlineError") == (steps["listing"].status, steps["listing"].error)


@pytest.mark.parametrize("step", ["endpoint", "credentials", "list"])
def test_a_plugin_with_a_fault(step: str, examine: Callable[..., dict[str, Step]], serve: Serve) -> None:
    """An error that is none of ours is the plugin's, and says so, without a traceback."""
    steps = examine(port=serve(), broken=step)

    failed = [found for found in steps.values() if found.status == "failed"]
    assert "did not translate RuntimeError" in failed[0].seen
    assert f"a fault in {step}" in failed[0].seen
    assert "report it" in (failed[0].hint or "")


def test_a_plugin_that_does_not_say_where_it_connects(sharded: Path) -> None:
    """The steps that it knows nothing of are skipped with that reason, and the others are taken."""

    class Quiet:
        @staticmethod
        @lookout.hookimpl
        def mx_register_storages() -> list[lookout.StorageProvider]:
            return [lookout.StorageProvider("mx-quiet", ("quiet",), lookout.open_lookout)]

    plugins = PluginManager.discover({})
    plugins.register(Quiet(), name="mx-quiet")

    steps = {step.name: step for step in diagnose(f"quiet://{sharded}", environ={}, plugins=plugins)}

    assert ["skipped"] * len(LOCAL) == statuses(steps, *LOCAL)
    assert all("mx-quiet does not say" in steps[name].seen for name in LOCAL)
    assert can_load(steps.values())


# -- a real S3 server --------------------------------------------------------------------------------------------------


@pytest.fixture
def on_s3(mx: Run) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Exit code and steps of the command for a URI with the variables of a user."""

    def on_s3(uri: str, environ: dict[str, str]) -> tuple[int, dict[str, Any]]:
        done = mx("doctor", uri, "--json", "--timeout", "3", environ=environ)
        assert "" == done.stderr
        secret = environ["AWS_SECRET_ACCESS_KEY"]
        assert not secret or secret not in done.stdout
        return done.returncode, {step["name"]: step for step in json.loads(done.stdout)["steps"]}

    return on_s3


OnS3 = Callable[[str, dict[str, str]], "tuple[int, dict[str, Any]]"]


@pytest.mark.parametrize(("user", "listing"), [("reader", "ok"), ("fetcher", "noted")])
def test_a_model_on_s3(user: str, listing: str, on_s3: OnS3, uploaded: str, s3_server: SeaweedFS) -> None:
    """It can be loaded, also by someone who may not list; connection, clock and credentials were seen."""
    code, steps = on_s3(uploaded, s3_server.environ(user))

    assert 0 == code, steps
    assert ("ok", "ok", "ok") == tuple(steps[name]["status"] for name in ("connection", "clock", "credentials"))
    assert (listing, "ok", "ok") == tuple(steps[name]["status"] for name in ("listing", "read", "checkpoint"))
    assert "AWS_ACCESS_KEY_ID" in steps["credentials"]["seen"]
    assert steps["read"]["facts"]["version"]


@pytest.mark.parametrize(
    ("change", "step", "words"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "connection", "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://no-such-host.invalid:9000"}, "name", "AWS_ENDPOINT_URL"),
        ({"AWS_SECRET_ACCESS_KEY": "not-the-one"}, "listing", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials", "AWS_PROFILE"),
        ({"uri": "s3://no-such-bucket/model"}, "listing", "AWS_ENDPOINT_URL"),
        ({"uri": "s3://models/no/such/prefix"}, "listing", "check the URI"),
        ({"user": "stranger"}, "listing", "s3:ListBucket"),
    ],
    ids=["refused", "unknown host", "wrong secret", "no keys", "no bucket", "no prefix", "no rights"],
)
def test_what_may_be_wrong_on_the_way_to_s3(
    change: dict[str, str], step: str, words: str, on_s3: OnS3, uploaded: str, s3_server: SeaweedFS
) -> None:
    """The first step that fails is the one that is wrong, and what to do names the variable or the right."""
    variables = {name: value for name, value in change.items() if name.startswith("AWS_")}

    code, steps = on_s3(change.get("uri", uploaded), {**s3_server.environ(change.get("user", "admin")), **variables})

    assert 1 == code
    assert step == next(name for name in STEPS if steps[name]["status"] == "failed")
    assert words in steps[step]["hint"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_model_on_disk(mx: Run, sharded: Path) -> None:
    """Exit code 0, and as JSON every step with the same keys."""
    as_text = mx("doctor", str(sharded))
    as_json = mx("doctor", str(sharded), "--json")

    assert (0, "") == (as_text.returncode, as_text.stderr)
    assert as_text.stdout.endswith("The model can be loaded.\n")
    assert "skipped name, connection, tls, clock, credentials: file is on this machine\n" in as_text.stdout
    content = json.loads(as_json.stdout)
    assert (0, "") == (as_json.returncode, as_json.stderr)
    assert (f"file://{sharded}", True) == (content["uri"], content["loads"])
    assert list(STEPS) == [step["name"] for step in content["steps"]]
    keys = {"name", "status", "seen", "milliseconds", "facts", "cause", "hint", "error"}
    assert [keys] * len(STEPS) == [set(step) for step in content["steps"]]


@pytest.mark.parametrize(
    ("uri", "code", "failed", "words"),
    [
        ("/no/such/model", 1, ["listing"], "check the URI"),
        ("nosuch://org/model", 1, ["plugin"], "install the plugin that handles nosuch"),
        ("s3:/bucket/model", 2, ["uri"], "write s3://bucket/model"),
        ("s3://", 2, ["plugin"], "write s3://bucket/path"),
    ],
)
def test_a_uri_that_leads_nowhere(uri: str, code: int, failed: list[str], words: str, mx: Run) -> None:
    """1 where a step failed, 2 where the URI is wrong; the step and the remedy are named, as text and as JSON."""
    as_text = mx("doctor", uri)
    as_json = mx("doctor", uri, "--json")

    assert (code, code) == (as_text.returncode, as_json.returncode), as_text.stderr
    assert words in as_text.stdout
    assert f"The model cannot be loaded. Failed: {failed[0]}." in as_text.stdout
    content = json.loads(as_json.stdout)
    assert failed == [step["name"] for step in content["steps"] if step["status"] == "failed"]
    assert not content["loads"]


def test_settings_that_cannot_be_used(mx: Run, sharded: Path) -> None:
    """They are the first step, and the URI is looked at all the same."""
    done = mx("doctor", str(sharded), "--json", environ={"MX_CONCURRENCY": "many", "MX_CHUNK_BYTES": "-1"})

    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert 1 == done.returncode
    assert ("failed", "SettingsError") == (steps["settings"]["status"], steps["settings"]["error"])
    assert "MX_CONCURRENCY" in steps["settings"]["seen"]
    assert "MX_CHUNK_BYTES" in steps["settings"]["seen"]
    assert ("ok", "skipped") == (steps["uri"]["status"], steps["plugin"]["status"])


def test_a_plugin_that_is_broken(mx: Run, tmp_path: Path) -> None:
    """It is said to be broken, with its reason, and not to be missing."""
    info = tmp_path / "mx_hf-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mx-hf\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelexpress.plugins]\nmx-hf = nowhere_to_be_found\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))

    done = mx("doctor", "hf://org/model", environ={"PYTHONPATH": path})

    assert 1 == done.returncode
    assert "installed but broken" in done.stdout
    assert "nowhere_to_be_found" in done.stdout


def test_a_checkpoint_that_is_damaged(mx: Run, sharded: Path, tmp_path: Path) -> None:
    """Reading works; the checkpoint is what is wrong, and the missing shard is named."""
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (copy / "model-00002-of-00003.safetensors").unlink()

    done = mx("doctor", str(copy), "--json")

    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert 1 == done.returncode
    assert ("ok", "ok", "failed") == tuple(steps[name]["status"] for name in ("listing", "read", "checkpoint"))
    assert "model-00002-of-00003.safetensors" in steps["checkpoint"]["seen"]


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "model.safetensors.index.json"])
def test_one_file_of_a_checkpoint(name: str, mx: Run, sharded: Path) -> None:
    """A file needs no listing; an index is listed by its directory."""
    done = mx("doctor", str(sharded / name), "--json")

    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert 0 == done.returncode
    assert ("skipped" if name.endswith(".safetensors") else "ok") == steps["listing"]["status"]
    assert "ok" == steps["checkpoint"]["status"]


def test_an_empty_file_is_no_checkpoint(mx: Run, tmp_path: Path) -> None:
    """There is nothing to read in it, and opening it fails."""
    (tmp_path / "model.safetensors").touch()

    done = mx("doctor", str(tmp_path / "model.safetensors"), "--json")

    steps = {step["name"]: step for step in json.loads(done.stdout)["steps"]}
    assert 1 == done.returncode
    assert ("skipped", "failed") == (steps["read"]["status"], steps["checkpoint"]["status"])


def test_wrong_usage(mx: Run, sharded: Path) -> None:
    """Exit code 2 without a URI, and for a time-out that is none."""
    assert 2 == mx("doctor").returncode
    assert 2 == mx("doctor", str(sharded), "--timeout", "0").returncode


def test_a_terminal_sees_marks(sharded: Path, on_terminal: Callable[..., tuple[int, bytes]]) -> None:
    """Marks in place of words."""
    code, seen = on_terminal("doctor", str(sharded), PYTHONIOENCODING="utf-8")

    assert 0 == code
    assert "✓".encode() in seen
    assert b"\x1b[" in seen
    assert b"skipped" not in seen


def test_no_torch_is_needed(sharded: Path) -> None:
    """Like ``mx inspect``, it reads headers without importing torch."""
    program = (
        "import sys; sys.argv = ['mx', 'doctor', sys.argv[1]]\n"
        "from modelexpress_core.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "assert 'torch' not in sys.modules"
    )

    done = subprocess.run([sys.executable, "-c", program, str(sharded)], capture_output=True, text=True, check=False)

    assert 0 == done.returncode, done.stderr


class _WithoutRange(MemoryStorage):
    """As of a server that ignores Range: every read begins at the start of the file."""

    refuses = False

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if offset and self.refuses:
            raise UnsupportedError("the server ignores Range", uri=f"memory://{path}", operation="read")
        return super().read_into(path, 0, buffer, version=version)


@pytest.mark.parametrize("refuses", [True, False], ids=["the plugin notices", "the plugin does not notice"])
@pytest.mark.parametrize("size", [2, 1000, 100_000, 1_000_000])
def test_a_server_that_ignores_range_is_found(size: int, refuses: bool) -> None:
    """By a read in the middle of a file, whether it overlaps the one at the start or not."""
    storage = _WithoutRange("test")
    storage.refuses = refuses
    storage.put("model/model.safetensors", b"ab" * (size // 2) if size == 2 else pattern(size, 1))

    class Plugin:
        @staticmethod
        @lookout.hookimpl
        def mx_register_storages() -> list[lookout.StorageProvider]:
            return [lookout.StorageProvider("mx-test", ("test",), lambda uri, settings: storage)]

    plugins = PluginManager.discover({})
    plugins.register(Plugin(), name="mx-test")

    steps = {step.name: step for step in diagnose("test://test/model", environ={}, plugins=plugins)}

    assert ["ok", "failed"] == statuses(steps, "listing", "read")
    assert f"read bytes {size // 2}-" in steps["read"].seen or refuses
    assert "Range" in f"{steps['read'].seen} {steps['read'].cause}"
    assert not can_load(steps.values()), "the headers can be read, and weights cannot"
