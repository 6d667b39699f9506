"""Flipped bits in transfers of objects with a digest: how many are detected, and whether a wrong tensor results."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import torch
from safetensors.torch import save

import modelexpress_core as mx
from benchmarks.checkpoints import digest_of
from benchmarks.measuring import Plan, Report, Target
from benchmarks.stores import STORES, Store
from devtools.tcp_proxy import Fault, TcpProxy

__all__ = ["run"]

#: Store -> digest -> upload options with which the store publishes this digest of the object.
_UPLOADS: dict[str, dict[str, dict[str, str]]] = {
    "S3": {
        "CRC32": {"ChecksumAlgorithm": "CRC32"},
        "CRC32C": {"ChecksumAlgorithm": "CRC32C"},
        "CRC64NVME": {"ChecksumAlgorithm": "CRC64NVME"},
        "SHA-256": {"ChecksumAlgorithm": "SHA256"},
        "MD5 (ETag)": {},
    },
    "GCS": {"CRC32C and MD5": {}},
    "Azure": {"MD5": {}},
}


class _Flip:
    """Flips one random bit in the body of one answer to a range request in each load.

    Args:
        seed: Seed of the random positions.
        header_bytes: Bytes of the first read that are used; it reads more than the header.
    """

    def __init__(self, seed: int, header_bytes: int) -> None:
        self._header_bytes = header_bytes
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._left = 0
        self.flipped = 0

    def arm(self, reads: int) -> None:
        """Flip a bit in one of the next ``reads`` reads."""
        with self._lock:
            self._left = self._chance.randrange(reads) + 1

    def __call__(self, _number: int, request: bytes) -> Fault | None:
        if not request.startswith(b"GET ") or b"range: bytes=" not in request.lower():
            return None
        with self._lock:
            self._left -= 1
            if self._left != 0:
                return None
            self.flipped += 1
            bits = 1 << self._chance.randrange(8)
            length = self._header_bytes if b"bytes=0-" in request else _CHUNK_BYTES
            return Fault("flip", after_bytes=self._chance.randrange(length), of_body=True, bits=bits)


_CHUNK_BYTES = 32 << 10


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        f"layers.{number}.weight": torch.randn(64, 256, generator=generator).to(torch.bfloat16) for number in range(16)
    }


def run(plan: Plan) -> Report:
    """Measure."""
    state = _state()
    content = save(state)
    expected = digest_of(state)
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    reads = 1 + sum(-(-tensor.nbytes // _CHUNK_BYTES) for tensor in state.values())
    loads = plan.pick(200, 4)
    rows = []
    for name, uploads in _UPLOADS.items():
        with STORES[name]() as store:
            for digest, options in uploads.items():
                number = len(rows)
                plan.say(f"{loads} loads from {name} with {digest}")
                store.put(f"{number}/model.safetensors", content, **options)
                rows.append(
                    _row(
                        store,
                        f"{store.uri}/{number}",
                        digest=digest,
                        flip=_Flip(number, header_bytes),
                        reads=reads,
                        loads=loads,
                        expected=expected,
                    )
                )
    corruptions = sum(row["corruptions"] for row in rows)
    return Report(
        "corruption",
        f"an object of {len(content) / 1e3:.0f} kB on SeaweedFS (S3), fake-gcs-server (GCS) and Azurite (Azure), read "
        f"in ranges of {_CHUNK_BYTES >> 10} KiB through a proxy that flips one bit of one answer of each load; every "
        "tensor is compared; fresh memory",
        rows,
        [
            Target("corruptions", corruptions, 1000.0 if not plan.quick else 1.0),
            Target(
                "corruptions that were detected: fetched again, or the load failed",
                sum(row["repaired"] + row["failed"] + row["header read again"] for row in rows) / corruptions
                if corruptions
                else None,
                1.0,
            ),
            Target("loads that ended with a wrong tensor", float(sum(row["wrong"] for row in rows)), 0.0, at_most=True),
        ],
        (),
        loads,
        plan.quick,
    )


def _row(store: Store, uri: str, *, digest: str, flip: _Flip, reads: int, loads: int, expected: str) -> dict[str, Any]:
    ends: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    reports: list[mx.LoadReport] = []

    class Watch:
        @mx.hookimpl
        def mx_load_finished(self, event: mx.LoadFinished) -> None:
            reports.append(event.report)

    with TcpProxy("127.0.0.1", store.port, flip) as proxy:
        environ = {**store.environ_at(proxy.port), "MX_CHUNK_BYTES": str(_CHUNK_BYTES)}
        plugins = mx.PluginManager.discover(environ)
        plugins.register(Watch(), name="benchmark")
        while flip.flipped < loads:
            before = flip.flipped
            flip.arm(reads)
            try:
                state = mx.load_state_dict(uri, environ=environ, plugins=plugins)
            except mx.ModelExpressError as exc:
                ends["failed"] += 1
                errors[type(exc).__name__] += 1
                continue
            if flip.flipped == before:
                continue
            if digest_of(state) != expected:
                ends["wrong"] += 1
            elif reports[-1].bytes_reread:
                ends["repaired"] += 1
            else:
                ends["header read again"] += 1
    return {
        "store": store.name,
        "digest": digest,
        "corruptions": flip.flipped,
        "repaired": ends["repaired"],
        "failed": ends["failed"],
        "header read again": ends["header read again"],
        "wrong": ends["wrong"],
        "verified loads": sum(report.verified["digests"] for report in reports),
        "errors": ", ".join(f"{name}: {count}" for name, count in errors.items()) or "none",
    }
