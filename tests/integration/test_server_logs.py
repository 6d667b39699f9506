"""What `mx serve` logs: as text and as JSON, each call at level debug, and no credentials."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import grpc
import pytest

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.proto.modelexpress import health_pb2
from modelexpress_core.wire.rpc import HEALTH, STANDARD_HEALTH, stub
from tests.support.commands import Commands
from tests.support.serving import Serving

Start = Callable[..., Serving]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def called(serving: Serving) -> None:
    """One call of each sort: answered, refused, streaming, unknown; with a token."""
    metadata = (("authorization", "Bearer hunter2"),)
    with open_channel(Endpoint.parse(serving.url)) as channel:
        health = stub(STANDARD_HEALTH, channel)
        stub(HEALTH, channel)["GetHealth"](health_pb2.GetHealthRequest(), timeout=10, metadata=metadata)
        with pytest.raises(grpc.RpcError):
            health["Check"](health_pb2.HealthCheckRequest(service="hunter2"), timeout=10, metadata=metadata)
        watch = health["Watch"](health_pb2.HealthCheckRequest(), timeout=10, metadata=metadata)
        next(watch)
        watch.cancel()
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/acme.Nothing/Call")(b"", timeout=10, metadata=metadata)


def lines(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


def test_json_is_an_object_on_each_line(start: Start) -> None:
    """With time, level, logger and message; each call with its fields, and without what it carried."""
    serving = start("--log-format", "json", MODEL_EXPRESS_LOG_LEVEL="debug")
    called(serving)

    _, said = serving.ended()

    logged = lines(said)
    for line in logged:
        assert {"time", "level", "logger", "message"} <= set(line)
        assert (
            abs(datetime.now(timezone.utc) - datetime.fromisoformat(line["time"].replace("Z", "+00:00"))).seconds < 300
        )
    calls = {line["method"]: line for line in logged if "method" in line}
    assert {"GetHealth": "OK", "Check": "NOT_FOUND", "Watch": "CANCELLED", "Call": "UNIMPLEMENTED"} == {
        method: line["code"] for method, line in calls.items()
    }
    assert HEALTH.name == calls["GetHealth"]["service"]
    assert 0 < calls["GetHealth"]["seconds"] < 10
    assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", calls["GetHealth"]["peer"])
    assert "debug" == calls["GetHealth"]["level"]
    assert "hunter2" not in said


def test_text_is_for_people(start: Start) -> None:
    """A line each, with time, level and logger, but for where the server is."""
    serving = start(MODEL_EXPRESS_LOG_LEVEL="debug")
    called(serving)

    _, said = serving.ended()

    logged = said.splitlines()
    assert "ending: calls in flight may end first" in logged
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z DEBUG modelexpress_core\.server\.calls: \S+/GetHealth: OK in .*"
    assert 1 == len([line for line in logged if re.fullmatch(pattern, line)])
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("arguments", "environ", "calls"),
    [
        ((), {}, False),
        ((), {"MODEL_EXPRESS_LOG_LEVEL": "warn"}, False),
        ((), {"MODEL_EXPRESS_LOG_LEVEL": "trace"}, True),
        (("--log-level", "warning"), {"MODEL_EXPRESS_LOG_LEVEL": "debug"}, False),
        (("--log-level", "debug"), {"MODEL_EXPRESS_LOG_LEVEL": "error"}, True),
    ],
)
def test_levels(arguments: tuple[str, ...], environ: dict[str, str], calls: bool, server_commands: Commands) -> None:
    """Calls are logged at debug; a level that is given to `mx` wins. Where the server is, is said at every level."""
    serving = Serving(server_commands, before=arguments, **environ)
    try:
        with ServerClient(serving.url) as client:
            client.health()
        _, said = serving.ended()
    finally:
        serving.end()

    assert calls == ("GetHealth" in said)
    assert "ending: " in said


def test_a_server_that_does_not_start_says_so_in_json(mx: Command) -> None:
    """Where the format is known by then."""
    done = mx("serve", "--log-format", "json", "--metadata", "etcd://:hunter2@h")

    [line] = lines(done.stderr)
    assert (1, "error", "UnknownSchemeError") == (done.returncode, line["level"], line["error"])
    assert "etcd" in line["message"]
    assert line["hint"]
    assert "hunter2" not in done.stderr


def test_a_port_that_is_taken_is_told_in_json(mx: Command) -> None:
    """In one line: gRPC's core adds none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        done = mx("serve", "--log-format", "json", "--host", "127.0.0.1", "--port", port, "--metrics-port", "0")

    [line] = lines(done.stderr)
    assert (1, "error") == (done.returncode, line["level"])
    assert port in line["message"]


_PROGRAM = """
import logging, warnings
from modelexpress_core.server.logs import write_log
from modelexpress_core.server.settings import LogSettings

write_log(LogSettings(level="debug", format=FORMAT))
ours, theirs = logging.getLogger("modelexpress_core.x"), logging.getLogger("botocore")
theirs.info("hunter2")
theirs.warning("theirs %s", 1)
ours.debug("two\\nlines", extra={"time": "never", "level": "none", "number": 7, "odd": object()})
warnings.warn("old", DeprecationWarning, stacklevel=1)
try:
    1 / 0
except ZeroDivisionError:
    ours.exception("broken")
"""


def logged_by(form: str) -> str:
    program = _PROGRAM.replace("FORMAT", repr(form))
    command = [sys.executable, "-W", "always", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stdout
    return done.stderr


def test_everything_is_in_the_json() -> None:
    """Warnings of Python, errors of others, fields and exceptions; what others say in detail is not."""
    said = logged_by("json")

    theirs, ours, warning, broken = lines(said)
    assert ("warning", "botocore", "theirs 1") == (theirs["level"], theirs["logger"], theirs["message"])
    assert ("debug", "two\nlines", 7) == (ours["level"], ours["message"], ours["number"])
    assert "never" != ours["time"]
    assert "DeprecationWarning: old" in warning["message"]
    assert ("error", "broken") == (broken["level"], broken["message"])
    assert "Traceback" in broken["exception"]
    assert "ZeroDivisionError" in broken["exception"]
    assert "hunter2" not in said


def test_everything_is_in_the_text() -> None:
    """The same for people."""
    said = logged_by("text")

    for part in (
        "WARNING botocore: theirs 1",
        "DEBUG modelexpress_core.x: two",
        "DeprecationWarning: old",
        "Traceback",
    ):
        assert part in said
    assert "hunter2" not in said
