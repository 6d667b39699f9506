"""Tokens, TLS and mutual TLS, between a server in a process of its own and our client; and what refusals say."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import AccessDeniedError, SettingsError, UnavailableError
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.diagnosis import diagnose
from modelexpress_core.wire.proto.modelexpress import api_pb2, health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import API, P2P, STANDARD_HEALTH, stub
from modelexpress_core.wire.settings import TlsSettings, TokenSettings
from tests.support.serving import Serving

Start = Callable[..., Serving]
Command = Callable[..., "subprocess.CompletedProcess[str]"]

_IDENTITY = SourceIdentity("acme/model")
_ALICE, _BOB = "a" * 32, "b0b" * 8


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Files:
    """Certificates, keys and tokens in a directory."""

    def __init__(self, directory: Path, authority: trustme.CA) -> None:
        self.directory = directory
        self.authority = authority
        self.ca = self.write("ca.pem", authority.cert_pem.bytes())

    def write(self, name: str, content: bytes | str) -> str:
        """In place of what was there, as one who replaces a file in use does it."""
        path = self.directory / name
        beside = path.with_suffix(".new")
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
        return str(path)

    def certificate(
        self, name: str, *names: str, authority: trustme.CA | None = None, expired: bool = False
    ) -> tuple[str, str]:
        now = datetime.now(timezone.utc)
        day = timedelta(days=1)
        issued = (authority or self.authority).issue_cert(
            *names, **({"not_before": now - 2 * day, "not_after": now - day} if expired else {})
        )
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return self.write(f"{name}.pem", chain), self.write(f"{name}-key.pem", issued.private_key_pem.bytes())

    def server(self, **options: bool) -> dict[str, str]:
        """Variables of a server with TLS."""
        certificate, key = self.certificate("server", "127.0.0.1", "localhost", **options)
        return {"MX_TLS_CERT_PATH": certificate, "MX_TLS_KEY_PATH": key}

    def tokens(self, *lines: str) -> dict[str, str]:
        """Variables of a server that wants tokens."""
        path = self.write("tokens", "\n".join(("# who", *lines, "")))
        return {"MX_AUTH_MODE": "token", "MX_AUTH_TOKENS_PATH": path}


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Files:
    return Files(tmp_path, authority)


def client(
    url: str, files: Files, token: str | None = None, certificate: tuple[str, str] | None = None, ca: str | None = None
) -> ServerClient:
    tls = TlsSettings(ca or files.ca, *(certificate or (None, None)))
    path = "/nowhere" if token is None else files.write(f"token-{len(token)}", token + "\n")
    return ServerClient(url, deadline_seconds=5, security=Security(tls, TokenSettings(path)))


def publish(client: ServerClient, worker_id: str = "w") -> p2p_pb2.PublishMetadataResponse:
    return client.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=p2p_pb2.SOURCE_STATUS_READY), worker_id)


def said(serving: Serving) -> str:
    """All that a server wrote, once it has been ended."""
    serving.process.terminate()
    assert serving.process.stderr is not None
    return serving.process.stderr.read()


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_token_opens_every_service(start: Start, files: Files) -> None:
    """Written out or as its digest; without one, or with a wrong one, nothing is answered but health."""
    digest = hashlib.sha256(_BOB.encode()).hexdigest()
    serving = start(MODEL_EXPRESS_LOG_LEVEL="debug", **files.tokens(f"alice:{_ALICE}", f"bob:sha256:{digest}"))
    for token in (_ALICE, _BOB):
        with client(serving.url, files, token) as known:
            assert publish(known, token[0]).success
    refusals = []
    for token in (None, "wrong" * 8):
        with client(serving.url, files, token) as unknown:
            assert "ok" == unknown.health().status
            for call in (lambda: publish(unknown), unknown.list_sources, lambda: unknown.metadata("0", "w")):
                with pytest.raises(AccessDeniedError) as refused:
                    call()
                refusals.append(str(refused.value))
    with open_channel(Endpoint.parse(serving.url)) as channel:
        health = stub(STANDARD_HEALTH, channel)["Check"](health_pb2.HealthCheckRequest(service=P2P.name), timeout=10)
        with pytest.raises(grpc.RpcError) as ping:
            stub(API, channel)["SendRequest"](api_pb2.Request(action="ping"), timeout=10)
    measured = serving.metrics()

    assert health_pb2.HealthCheckResponse.SERVING == health.status
    assert grpc.StatusCode.UNAUTHENTICATED == ping.value.code()
    assert ["none was sent" in text for text in refusals] == [True] * 3 + [False] * 3
    assert ["not one that is known" in text for text in refusals] == [False] * 3 + [True] * 3
    assert all("MX_AUTH_TOKEN_PATH" in text for text in refusals)
    assert 'mx_server_rpcs_total{code="UNAUTHENTICATED",method="ListSources"' in measured
    words = said(serving)
    everything = words + measured + "".join(refusals)
    assert not [token for token in (_ALICE, _BOB, "wrong" * 8) if token in everything]


def test_only_whoever_published_a_record_changes_it(start: Start, files: Files) -> None:
    """Another is told so, and the record stays as it was."""
    serving = start(**files.tokens(f"alice:{_ALICE}", f"bob:{_BOB}"))
    update = p2p_pb2.UpdateStatusRequest(
        mx_source_id=_IDENTITY.source_id, worker_id="w", status=p2p_pb2.SOURCE_STATUS_STALE
    )
    with client(serving.url, files, _ALICE) as alice, client(serving.url, files, _BOB) as bob:
        publish(alice)
        for call in (lambda: publish(bob), lambda: bob.update_status(update)):
            with pytest.raises(AccessDeniedError, match="published by another"):
                call()

        assert p2p_pb2.SOURCE_STATUS_READY == bob.metadata(_IDENTITY.source_id, "w").worker.status
        assert alice.update_status(update).success


def test_tokens_are_replaced_while_all_run(start: Start, files: Files) -> None:
    """On both sides; a file that makes no sense changes nothing, and the log says so."""
    serving = start(**files.tokens(f"alice:{_ALICE}"))
    with client(serving.url, files, _ALICE) as alice:
        alice.list_sources()
        files.tokens(f"alice:{_BOB}")
        with pytest.raises(AccessDeniedError):
            alice.list_sources()
        files.write(f"token-{len(_ALICE)}", _BOB)
        alice.list_sources()
        files.tokens("a line that says nothing")
        alice.list_sources()

    words = said(serving)
    assert "line 2 is neither name:token nor name:sha256:digest" in words
    assert 1 == words.count("stays in use")


def test_a_token_file_without_a_token(start: Start, files: Files) -> None:
    """Is an error of the client, which sends nothing."""
    with client(start().url, files, "two words") as confused, pytest.raises(SettingsError, match="MX_AUTH_TOKEN_PATH"):
        confused.health()


def test_strangers_fill_no_memory(start: Start, files: Files) -> None:
    """What they send is not read: they are refused on what stands before it."""
    serving = start(**files.tokens(f"alice:{_ALICE}"))
    process = Path(f"/proc/{serving.process.pid}/status")

    def peak() -> int:
        [line] = [line for line in process.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) << 10

    worker = p2p_pb2.WorkerMetadata(nixl_metadata=bytes(40 << 20))
    with client(serving.url, files, "wrong" * 8) as stranger:
        with pytest.raises(AccessDeniedError):
            stranger.list_sources()
        before = peak()

        def send(_: int) -> bool:
            with pytest.raises(AccessDeniedError, match="not one that is known"):
                stranger.publish(_IDENTITY, worker, "w")
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(send, range(8)))

    assert peak() - before < 64 << 20


def test_a_token_file_that_goes_away(start: Start, files: Files) -> None:
    """Then none is sent; and a new one is, when it comes."""
    with client(start(**files.tokens(f"alice:{_ALICE}")).url, files, _ALICE) as alice:
        alice.list_sources()
        (files.directory / f"token-{len(_ALICE)}").unlink()
        with pytest.raises(AccessDeniedError, match="none was sent"):
            alice.list_sources()
        files.write(f"token-{len(_ALICE)}", _ALICE)
        alice.list_sources()


# -- TLS ---------------------------------------------------------------------------------------------------------------


def test_tls_and_tokens_together(start: Start, files: Files, mx: Command) -> None:
    """As a whole: the command line takes all of it from the environment."""
    serving = start(**files.server(), **files.tokens(f"alice:{_ALICE}"))
    environ = {
        "MODEL_EXPRESS_URL": f"https://{serving.url}",
        "MX_TLS_CA_PATH": files.ca,
        "MX_AUTH_TOKEN_PATH": files.write("token", _ALICE),
    }

    assert "no sources\n" == mx("sources", environ=environ).stdout
    refused = mx("sources", environ={**environ, "MX_AUTH_TOKEN_PATH": "/nowhere"})
    assert (1, True) == (refused.returncode, "none was sent" in refused.stderr), refused.stderr


def test_certificates_are_replaced_while_a_server_runs(start: Start, files: Files) -> None:
    """New connections see the new ones; old ones live on; a pair that does not fit changes nothing."""
    serving = start(**files.server())
    url = f"https://{serving.url}"
    with client(url, files) as before:
        before.health()
        other = trustme.CA()
        files.certificate("server", "127.0.0.1", authority=other)
        other_ca = files.write("other.pem", other.cert_pem.bytes())
        before.health()
        with client(url, files, ca=other_ca) as after:
            after.health()
        with client(url, files) as distrustful, pytest.raises(AccessDeniedError, match="not trusted"):
            distrustful.health()
        files.certificate("another", "127.0.0.1", authority=other)
        os.replace(files.directory / "another-key.pem", files.directory / "server-key.pem")
        with client(url, files, ca=other_ca) as late:
            late.health()

    assert "are not a pair" in said(serving)


def test_a_client_takes_up_new_authorities(start: Start, files: Files) -> None:
    """Without being made anew."""
    other = trustme.CA()
    url = f"https://{start(**files.server()).url}"
    path = files.write("mine.pem", other.cert_pem.bytes())
    with client(url, files, ca=path) as patient:
        with pytest.raises(AccessDeniedError):
            patient.health()
        files.write("mine.pem", files.authority.cert_pem.bytes())

        assert "ok" == patient.health().status


def test_mutual_tls(start: Start, files: Files) -> None:
    """A certificate of an authority that the server knows is let in, under its name; others are told what is wrong."""
    mtls = {"MX_AUTH_MODE": "mtls", "MX_TLS_CA_PATH": files.ca}
    serving = start("--health-port", "0", **files.server(), **mtls)
    url = f"https://{serving.url}"
    worker = files.certificate("worker", "spiffe-worker.acme")
    with client(url, files, certificate=worker) as alice:
        publish(alice)
    with client(url, files, certificate=files.certificate("renewed", "spiffe-worker.acme")) as renewed:
        publish(renewed)
    with (
        client(url, files, certificate=files.certificate("b", "other.acme")) as bob,
        pytest.raises(AccessDeniedError, match="published by another"),
    ):
        publish(bob)

    for certificate, reason in (
        (None, "it wants a certificate, and none was shown"),
        (files.certificate("stranger", "x.acme", authority=trustme.CA()), "does not know the authority"),
        (files.certificate("old", "x.acme", expired=True), "our certificate has expired"),
    ):
        with client(url, files, certificate=certificate) as stranger, pytest.raises(AccessDeniedError, match=reason):
            stranger.health()
    assert serving.health_url is not None
    with open_channel(Endpoint.parse(serving.health_url)) as channel:
        health = stub(STANDARD_HEALTH, channel)["Check"](health_pb2.HealthCheckRequest(), timeout=10)
        with pytest.raises(grpc.RpcError) as elsewhere:
            stub(P2P, channel)["ListSources"](p2p_pb2.ListSourcesRequest(), timeout=10)
    assert health_pb2.HealthCheckResponse.SERVING == health.status
    assert grpc.StatusCode.UNIMPLEMENTED == elsewhere.value.code()


def test_connections_that_do_not_come_about_name_the_cause(start: Start, files: Files) -> None:
    """What it is, and what to do: expired, of another authority, for another host, TLS on one side alone."""
    tls, plain = start(**files.server()), start()
    expired = start(**files.server(expired=True))
    other_ca = files.write("other.pem", trustme.CA().cert_pem.bytes())
    elsewhere = Files(files.directory, files.authority).certificate("elsewhere", "models.acme")
    misnamed = start(MX_TLS_CERT_PATH=elsewhere[0], MX_TLS_KEY_PATH=elsewhere[1])

    for url, ca, error, words in (
        (f"https://{expired.url}", files.ca, AccessDeniedError, ("server's certificate has expired", "renew it")),
        (f"https://{tls.url}", other_ca, AccessDeniedError, ("is not trusted", "MX_TLS_CA_PATH")),
        (f"https://{misnamed.url}", files.ca, AccessDeniedError, ("is for another host",)),
        (tls.url, files.ca, UnavailableError, ("speaks TLS", f"MODEL_EXPRESS_URL=https://{tls.url}")),
        (f"https://{plain.url}", files.ca, UnavailableError, ("does not speak TLS", "http:// in place of https://")),
        ("https://127.0.0.1:1", files.ca, UnavailableError, ("no server listens there",)),
        ("no-such-host.invalid:8001", files.ca, UnavailableError, ("no such name",)),
    ):
        with client(url, files, ca=ca) as refused, pytest.raises(error) as raised:
            refused.health()
        text = str(raised.value)
        assert [word for word in (*words, "could not call GetHealth of http") if word not in text] == [], text


def test_what_hangs_up_or_says_nothing_is_told_apart(files: Files) -> None:
    """A proxy without a server behind it, a server that hangs, TLS without HTTP/2: none is a matter of certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files.authority.issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])

    def other_program(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            secure.recv(1)

    for scheme, answer, words in (
        ("https", lambda sock: sock.close(), "closed before TLS has begun"),
        ("https", lambda sock: time.sleep(3), "sends nothing"),
        ("http", lambda sock: time.sleep(3), "sends nothing"),
        ("https", other_program, "no gRPC server"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def serve() -> None:
                while True:
                    try:
                        sock, _ = listening.accept()
                    except OSError:
                        return
                    threading.Thread(target=answer_to, args=(sock, answer), daemon=True).start()  # noqa: B023 - as above

            threading.Thread(target=serve, daemon=True).start()
            tls = TlsSettings(files.ca)
            port = listening.getsockname()[1]
            error = diagnose(Endpoint.parse(f"{scheme}://127.0.0.1:{port}"), tls)
            listening.shutdown(socket.SHUT_RDWR)

        assert isinstance(error, UnavailableError), words
        assert words in str(error)


def answer_to(sock: socket.socket, answer: Callable[[socket.socket], object]) -> None:
    with sock, contextlib.suppress(OSError):
        answer(sock)


# -- what cannot be used -----------------------------------------------------------------------------------------------


def test_keys_that_grpc_does_not_take_are_told(files: Files, mx: Command) -> None:
    """And not called a taken port."""
    key = ed448.Ed448PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .sign(key, None)
        .public_bytes(serialization.Encoding.PEM)
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    environ = {
        "MX_TLS_CERT_PATH": files.write("odd.pem", certificate),
        "MX_TLS_KEY_PATH": files.write("odd-key.pem", pem),
    }

    done = mx("serve", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", environ=environ)

    assert (1, True) == (done.returncode, "gRPC cannot use" in done.stderr), done.stderr


def test_settings_that_make_no_sense_stop_the_server(files: Files, mx: Command) -> None:
    """Each with what is wrong, before anything is served."""
    certificate, key = files.certificate("server", "127.0.0.1")
    other_key = files.certificate("other", "127.0.0.1")[1]
    pair = {"MX_TLS_CERT_PATH": certificate, "MX_TLS_KEY_PATH": key}
    nothing = files.write("empty", "")
    token = {"MX_AUTH_MODE": "token"}
    for environ, words in (
        ({"MX_TLS_CERT_PATH": certificate}, ("MX_TLS_KEY_PATH is not set",)),
        ({**pair, "MX_TLS_KEY_PATH": other_key}, ("are not a pair",)),
        ({**pair, "MX_TLS_KEY_PATH": nothing}, ("cannot be used", nothing)),
        ({**pair, "MX_TLS_CERT_PATH": "/no/such"}, ("MX_TLS_CERT_PATH", "/no/such", "No such file")),
        ({**pair, "MX_TLS_CA_PATH": nothing}, ("MX_TLS_CA_PATH", "no certificates")),
        ({"MX_AUTH_MODE": "mtls"}, ("MX_TLS_CA_PATH and MX_TLS_CERT_PATH are not set",)),
        ({"MX_AUTH_MODE": "password"}, ("is 'password'", "installed: kubernetes, mtls, token", "or to off")),
        (token, ("MX_AUTH_TOKENS_PATH",)),
        ({**token, "MX_AUTH_TOKENS_PATH": "/no/such"}, ("MX_AUTH_TOKENS_PATH", "No such file")),
        ({**token, "MX_AUTH_TOKENS_PATH": nothing}, ("no tokens in it",)),
        ({**token, "MX_AUTH_TOKENS_PATH": files.write("t1", "alice:secret")}, ("line 1 has a token of fewer than 16",)),
        (
            {**token, "MX_AUTH_TOKENS_PATH": files.write("t2", f"\nalice:{_ALICE}\nbob:{_ALICE}")},
            ("line 3 has the token of another name",),
        ),
        ({**token, "MX_AUTH_TOKENS_PATH": files.write("t4", f"alice:sha256:{'a' * 63}")}, ("line 1 is neither",)),
        ({**token, "MX_AUTH_TOKENS_PATH": files.write("t3", _ALICE)}, ("line 1 is neither",)),
    ):
        done = mx("serve", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", environ=environ)
        assert 1 == done.returncode, done.stderr
        assert [word for word in words if word not in done.stderr] == [], done.stderr
        assert "Traceback" not in done.stderr
        assert not [secret for secret in (_ALICE, "secret") if secret in done.stderr], done.stderr
