"""Loads over a faulty network: how many succeed with the right bytes, and how many bytes are fetched twice."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

import torch

import modelexpress_core as mx
from benchmarks.checkpoints import digest_of, digest_of_directory, generated, sections
from benchmarks.measuring import Plan, Report, Target, median
from benchmarks.stores import STORES, Store
from devtools.tcp_proxy import Fault, TcpProxy

__all__ = ["run"]

_SHARES = (0.01, 0.05)
_KINDS = ("reset", "truncate", "unavailable", "stall")


class _Faults:
    """Injects a fault into a share of the requests, at a random position of the answer.

    Args:
        share: Share of all requests.
        body_bytes: Largest position in a body.
    """

    def __init__(self, share: float, body_bytes: int) -> None:
        self._share = share
        self._body_bytes = body_bytes
        self._chance = random.Random(f"{share}")
        self._lock = threading.Lock()
        self.injected: Counter[str] = Counter()

    def __call__(self, _number: int, _request: bytes) -> Fault | None:
        with self._lock:
            if self._chance.random() >= self._share:
                return None
            kind: Any = self._chance.choice(_KINDS)
            self.injected[kind] += 1
            return Fault(kind, after_bytes=self._chance.randrange(self._body_bytes))


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=True)
    total = sum(section.length for section in sections(directory))
    expected = digest_of_directory(directory)
    loads = plan.pick(100, 3)
    rows: list[dict[str, Any]] = []
    for name, start in STORES.items():
        with start() as store:
            uri = store.upload(directory, "model")
            of_store: list[dict[str, Any]] = []
            for share in (0.0, *_SHARES):
                plan.say(f"{loads} loads from {name} with {share:.0%} of requests failing")
                attempts = loads if share else 10
                of_store.append(_row(store, uri, share=share, total=total, expected=expected, loads=attempts))
        clean = of_store[0]["wire bytes / needed"]
        rows += [{**row, "fetched twice": row["wire bytes / needed"] - clean} for row in of_store]
    return Report(
        "faults",
        f"{total / 1e6:.0f} MB in 4 objects on SeaweedFS (S3), fake-gcs-server (GCS) and Azurite (Azure), in reads of "
        f"64 KiB, through a proxy that fails a share of all requests: {', '.join(_KINDS)}, a quarter each, at any "
        "byte; every tensor is compared; bytes are counted by the proxy; fresh memory",
        rows,
        [
            *(
                Target(
                    f"{row['store']}, {row['failing']} failing: loads that succeed with the right bytes",
                    row["right"] / row["loads"],
                    1.0,
                )
                for row in rows
                if row["failing"] != "0%"
            ),
            *(
                Target(
                    f"{row['store']}, {row['failing']} failing: bytes fetched twice over the model's",
                    row["fetched twice"],
                    0.05,
                    at_most=True,
                )
                for row in rows
                if row["failing"] == f"{_SHARES[-1]:.0%}"
            ),
        ],
        (),
        loads,
        plan.quick,
    )


def _row(store: Store, uri: str, *, share: float, total: int, expected: str, loads: int) -> dict[str, Any]:
    faults = _Faults(share, 64 << 10)
    seconds, errors, right, retries = [], Counter[str](), 0, 0
    reports: list[mx.LoadReport] = []

    class Watch:
        @mx.hookimpl
        def mx_load_finished(self, event: mx.LoadFinished) -> None:
            reports.append(event.report)

    with TcpProxy("127.0.0.1", store.port, faults) as proxy:
        environ = {**store.environ_at(proxy.port), "MX_CHUNK_BYTES": str(64 << 10)}
        plugins = mx.PluginManager.discover(environ)
        plugins.register(Watch(), name="benchmark")
        for _ in range(loads):
            begun = time.perf_counter()
            state: dict[str, torch.Tensor] = {}
            try:
                state = mx.load_state_dict(uri, environ=environ, plugins=plugins)
            except mx.ModelExpressError as exc:
                errors[type(exc).__name__] += 1
            else:
                right += digest_of(state) == expected
            seconds.append(time.perf_counter() - begun)
        sent = proxy.sent_bytes
    retries = sum(report.retries for report in reports)
    return {
        "store": store.name,
        "failing": f"{share:.0%}",
        "loads": loads,
        "right": right,
        "requests struck": faults.injected.total(),
        "retries": retries,
        "wire bytes / needed": sent / loads / total,
        "seconds a load": round(median(seconds), 2),
        "longest": round(max(seconds), 2),
        "errors": ", ".join(f"{name}: {count}" for name, count in errors.items()) or "none",
        "details": {"injected": dict(faults.injected)},
    }
