"""Failures over all stores: what each message says, by fixed rules, and how long a load takes until its final error."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import frozen

import modelexpress_core as mx
from benchmarks.failures import FAILURES, MODEL_DIGEST, SERVERS, Failure, Scene, Site
from benchmarks.measuring import Absent, Plan, Report, Target
from devtools.missing import ToolMissingError
from modelexpress_core.doctor import Step, can_load, diagnose

__all__ = [
    "BOUND_SECONDS",
    "ENVIRON",
    "PARTS",
    "SETTINGS",
    "Outcome",
    "found_by_doctor",
    "load",
    "points",
    "refreshed",
    "run",
    "same_cause",
    "steady",
]

#: The final error comes within this time.
BOUND_SECONDS = 10.0

#: Settings of our loads, which make them give up early.
SETTINGS = {
    "MX_RETRY_ATTEMPTS": "2",
    "MX_RETRY_BUDGET_SECONDS": "1",
    "MX_STALL_SECONDS": "1",
    **{f"MX_{store}_{what}_TIMEOUT_SECONDS": "0.5" for store in ("S3", "GCS", "AZURE") for what in ("CONNECT", "READ")},
}

#: What azure-identity reads from the environment of the process: a machine without a managed identity.
ENVIRON = {
    "AZURE_POD_IDENTITY_AUTHORITY_HOST": "http://127.0.0.1:1",
    "AZURE_TOKEN_CREDENTIALS": "ManagedIdentityCredential",
}

#: What each message is scored for: one point each.
PARTS = ("object", "operation", "cause", "next step", "in time")

_OPERATION = r"\b(?:list|read|open|connect|download|fetch|get|stat|load)(?:ing)?\b"

#: A process of runai-model-streamer is ended after this time, which includes its start.
_RUNAI_SECONDS = 60.0
_RUNAI_AT_ONCE = 3
_QUICK_FAILURES = 3
_DEFAULTS_AT_ONCE = 16

#: The scheme's package for runai-model-streamer.
_RUNAI_PACKAGES = {
    "S3": "runai_model_streamer_s3",
    "GCS": "runai_model_streamer_gcs",
    "Azure": "runai_model_streamer_azure",
}


@frozen
class Outcome:
    """How a load ended.

    Attributes:
        error: The class; empty if there was no error.
        message: All of the message; what happened instead if there was no error.
        seconds: Until the end.
        log: What was logged besides.
    """

    error: str
    message: str
    seconds: float
    log: str = ""


def load(scene: Scene, settings: Mapping[str, str] = SETTINGS, plugins: mx.PluginManager | None = None) -> Outcome:
    """Load with ModelExpress in this process; with plugins that were found before, if there are any."""
    begun = time.monotonic()
    try:
        mx.load_state_dict(scene.uri, environ={**scene.environ, **settings}, plugins=plugins)
    except mx.ModelExpressError as exc:
        return Outcome(type(exc).__name__, str(exc), time.monotonic() - begun)
    return Outcome("", "it loaded", time.monotonic() - begun)


def _runai(scene: Scene) -> Outcome:
    """Load with runai-model-streamer in another process, with its log."""
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.runai_load", scene.runai_path],
            env={**os.environ, **scene.runai_environ, "RUNAI_STREAMER_LOG_TO_STDERR": "1"},
            capture_output=True,
            text=True,
            timeout=_RUNAI_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        log = exc.stderr.decode("utf-8", "replace") if isinstance(exc.stderr, bytes) else exc.stderr or ""
        return Outcome("", f"no error within {_RUNAI_SECONDS:.0f} s", time.monotonic() - begun, _without_stamps(log))
    log = _without_stamps(done.stderr)
    last = done.stdout.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        return Outcome("", f"its process ended with status {done.returncode}", time.monotonic() - begun, log)
    answer: dict[str, Any] = json.loads(last)
    if not answer["error"]:
        right = answer["digest"] == MODEL_DIGEST
        return Outcome("", f"it loaded {'the right' if right else 'wrong'} bytes", answer["seconds"], log)
    return Outcome(answer["error"], answer["message"], answer["seconds"], log)


def _without_stamps(log: str) -> str:
    """The lines of its log without colours, times, numbers of processes, and places in the source; each line once."""
    lines = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in log.splitlines())
    lines = (re.sub(r"^(?:\[[^\]]*\] ?)+", "", line).strip() for line in lines)
    return "\n".join(dict.fromkeys(line for line in lines if line))


def points(failure: Failure, scene: Scene, text: str, seconds: float) -> dict[str, bool]:
    """Which parts a message has; the same rules for everybody."""
    path = scene.uri.partition("://")[2]
    rest = text.replace(path, "")  # names of failures are parts of paths

    def has(pattern: str) -> bool:
        return re.search(pattern, rest, re.IGNORECASE) is not None

    return {
        "object": path in text,
        "operation": has(_OPERATION),
        "cause": has(failure.cause),
        "next step": has(failure.next_step),
        "in time": bool(text) and seconds <= BOUND_SECONDS,
    }


def found_by_doctor(scene: Scene, plugins: mx.PluginManager | None = None) -> Step | None:
    """The first step that fails when ``mx doctor`` examines it; None if it finds that the model can be loaded."""
    environ = {**scene.environ, **SETTINGS}
    steps = list(diagnose(scene.uri, environ=environ, plugins=plugins, timeout_seconds=1.0))
    return None if can_load(steps) else next(step for step in steps if step.status == "failed")


def same_cause(failure: Failure, scene: Scene, step: Step) -> bool:
    """Whether a step names the cause of the failure."""
    said = f"{step.seen}\n{step.cause or ''}".replace(scene.uri.partition("://")[2], "")
    return re.search(failure.cause, said, re.IGNORECASE) is not None


# -- the benchmark -----------------------------------------------------------------------------------------------------


def run(plan: Plan) -> Report:
    """Measure."""
    os.environ.update(ENVIRON)
    scratch = plan.scratch / "errors"
    scratch.mkdir(exist_ok=True)
    chosen = plan.pick(FAILURES, [failure for failure in FAILURES if failure.store == "file"][:_QUICK_FAILURES])
    absent: list[Absent] = []
    with contextlib.ExitStack() as stack:
        sites = _sites(stack, scratch, {failure.store for failure in chosen}, absent)
        present = [failure for failure in chosen if failure.store in sites]
        plan.say(f"{len(present)} failures: our message, and what mx doctor finds")
        for failure in {failure.store: failure for failure in present}.values():
            _by_default(failure, sites[failure.store])  # imports what loads from the store need
        rows = [_ours(failure, sites[failure.store]) for failure in present]
        if not plan.quick:
            plan.say("with default settings")
            with ThreadPoolExecutor(_DEFAULTS_AT_ONCE) as pool:
                by_default = pool.map(lambda failure: _by_default(failure, sites[failure.store]), present)
                rows = [{**row, "by default": seconds} for row, seconds in zip(rows, by_default, strict=True)]
        plan.say("runai-model-streamer")
        with ThreadPoolExecutor(_RUNAI_AT_ONCE) as pool:
            theirs = list(pool.map(lambda failure: _theirs(failure, sites[failure.store]), present))
        rows = [_joined(row, other, scratch) for row, other in zip(rows, theirs, strict=True)]
    counted = [row for row in rows if row["details"]["runai"]["scored"]]
    seen = [row for row in rows if row["details"]["doctor visible"]]
    most = len(PARTS)
    return Report(
        "errors",
        f"each failure over SeaweedFS, fake-gcs-server, Azurite or files, with {_listed(SETTINGS)}; a point each "
        f"for the object, the operation, the cause, the next step, and a final error within {BOUND_SECONDS:.0f} s; "
        "runai-model-streamer with its log and its default settings",
        rows,
        [
            Target("messages with all points", sum(row["score"] == most for row in rows) / len(rows), 1.0),
            Target("longest time to the final error", max(row["seconds"] for row in rows), BOUND_SECONDS, True, "s"),
            Target("failures whose cause mx doctor finds", sum(bool(row["doctor"]) for row in seen) / len(seen), 1.0),
            Target(
                "our points over those of runai-model-streamer with its log, where both were scored",
                sum(row["score"] for row in counted) / max(1, sum(row["runai score"] for row in counted)),
                1.0,
            ),
        ],
        absent,
        1,
        plan.quick,
    )


def refreshed(rows: Sequence[Mapping[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """The rows with our messages of today; what takes minutes stays: default settings, and runai-model-streamer.

    Raises:
        ToolMissingError: A server is missing.
    """
    os.environ.update(ENVIRON)
    failures = {failure.slug: failure for failure in FAILURES}
    found = []
    with contextlib.ExitStack() as stack:
        absent: list[Absent] = []
        sites = _sites(stack, scratch, set(SERVERS), absent)
        if absent:
            raise ToolMissingError(absent[0].reason)
        for failure in {failure.store: failure for failure in FAILURES}.values():
            with failure.scene(sites[failure.store], failure.slug) as scene:
                load(scene)  # imports what loads from the store need
        for row in rows:
            failure = failures[row["details"]["slug"]]
            ours = {**_ours(failure, sites[failure.store]), "by default": row["by default"]}
            details = steady(ours["details"], scratch)
            found.append({**row, **ours, "details": {**details, "runai": row["details"]["runai"]}})
    return found


def _listed(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _sites(stack: contextlib.ExitStack, scratch: Path, stores: set[str], absent: list[Absent]) -> dict[str, Site]:
    sites = {}
    for store, (site, server) in SERVERS.items():
        if store not in stores:
            continue
        try:
            sites[store] = site(scratch, None if server is None else stack.enter_context(server()))
            stack.callback(sites[store].close)
        except ToolMissingError as exc:
            absent.append(Absent(store, str(exc)))
    return sites


def _ours(failure: Failure, site: Site) -> dict[str, Any]:
    with failure.scene(site, failure.slug) as scene:
        outcome = load(scene)
        found = points(failure, scene, outcome.message, outcome.seconds)
    row: dict[str, Any] = {
        "store": failure.store,
        "failure": failure.what,
        "error": outcome.error,
        "score": sum(found.values()) if outcome.error == failure.error else 0,
        "seconds": round(outcome.seconds, 2),
        "by default": None,
        "doctor": "",
        "details": {
            "slug": failure.slug,
            "message": outcome.message,
            "points": found,
            "doctor visible": failure.doctor,
            "doctor": "",
        },
    }
    if failure.doctor:
        with failure.scene(site, failure.slug) as scene:
            step = found_by_doctor(scene)
        if step is not None:
            row["doctor"] = step.name if same_cause(failure, scene, step) else ""
            row["details"]["doctor"] = "\n".join(filter(None, (step.seen, step.cause, step.hint)))
    return row


def _by_default(failure: Failure, site: Site) -> float:
    with failure.scene(site, failure.slug) as scene:
        return round(load(scene, {}).seconds, 2)


def _theirs(failure: Failure, site: Site) -> dict[str, Any]:
    package = _RUNAI_PACKAGES.get(failure.store, "runai_model_streamer")
    if importlib.util.find_spec(package) is None:
        return {"scored": False, "message": f"{package} is not installed", "log": "", "score": None, "seconds": None}
    with failure.scene(site, failure.slug) as scene:
        if scene.runai_absent:
            return {"scored": False, "message": scene.runai_absent, "log": "", "score": None, "seconds": None}
        outcome = _runai(scene)
        # An error counts, and so does one that is missing although the bytes are wrong, or that does not come at all.
        scored = outcome.message != "it loaded the right bytes"
        text = outcome.message if outcome.error else ""
        alone = points(failure, scene, text, outcome.seconds)
        with_log = points(failure, scene, f"{text}\n{outcome.log}" if text else "", outcome.seconds)
    message = f"{outcome.error}: {outcome.message}" if outcome.error else outcome.message
    return {
        "scored": scored,
        "message": message,
        "log": outcome.log,
        "score": sum(with_log.values()) if scored else None,
        "alone": sum(alone.values()) if scored else None,
        "points": with_log,
        "seconds": round(outcome.seconds, 2),
    }


def _joined(row: dict[str, Any], theirs: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The row with the result of runai-model-streamer; texts without what differs from run to run."""
    details = {**row["details"], "runai": theirs}
    return {
        **row,
        "runai score": theirs["score"],
        "runai without its log": theirs.get("alone"),
        "runai seconds": theirs["seconds"],
        "details": steady(details, scratch),
    }


def steady(value: Any, scratch: Path) -> Any:  # noqa: ANN401 - JSON
    """The texts in ``value`` without what differs from run to run: directories, ports, ids of requests."""
    if isinstance(value, dict):
        return {key: steady(item, scratch) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    value = value.replace(str(scratch), "/models")
    value = re.sub(r"127\.0\.0\.1:\d{2,5}", "127.0.0.1:PORT", value)
    value = re.sub(r", request [0-9A-Fa-f-]+", "", value)
    return re.sub(r"\b[0-9A-F]{24}\b|\b[0-9a-f]{8}-[0-9a-f-]{27}\b", "ID", value)
