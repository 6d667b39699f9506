"""Contenders in separate processes for all rounds, so that they share no threads, memory or settings.

A worker gets an order to run once with a setting, and answers with time and CPU time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from attrs import define, field, frozen

from benchmarks.measuring import Absent, Plan, median

__all__ = ["Entry", "Measurement", "Worker", "WorkerError", "measure", "started"]

_END_SECONDS = 10.0


#: Memory that a contender may need: the checkpoint, and one copy of it.
_BACKED_BYTES = 3 << 30
#: <linux/mman.h>, since Linux 5.14; Python has no name for it.
_MADV_POPULATE_WRITE = 23


class WorkerError(RuntimeError):
    """A contender failed, for the reason in the message."""


@frozen
class Measurement:
    """One run.

    Attributes:
        seconds: Wall time.
        cpu_seconds: CPU time of the contender's process, all threads, in user and kernel mode.
        digest: Digest of the loaded tensors, if requested.
        details: Further figures of the contender.
    """

    seconds: float
    cpu_seconds: float
    digest: str | None = None
    details: Mapping[str, Any] = field(factory=dict)


class Worker:
    """A contender in a separate process.

    Args:
        contender: ``module:class``. Its instances have ``run(**setting)``, which is timed and may return details,
            ``digest()`` of the tensors of the last run, and ``release()``.
        arguments: Arguments of its constructor.
        environ: Additional environment variables of its process.
        before: Start of the command that runs it, for example in a network namespace.
    """

    def __init__(
        self,
        contender: str,
        arguments: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
        *,
        before: Sequence[str] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [*before, sys.executable, "-m", "benchmarks.workers", contender, json.dumps(arguments)],
            env={**os.environ, **(environ or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, *, digest: bool = False, **setting: object) -> Measurement:
        """Run the contender once.

        Raises:
            WorkerError: It failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"setting": setting, "digest": digest}) + "\n")
        self._process.stdin.flush()
        return Measurement(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            message = f"its process ended with status {self._process.wait()}"
            raise WorkerError(message)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@define
class Entry:
    """One contender with one setting: a row of a table.

    Attributes:
        contender: Name in tables.
        worker: Name of the worker that runs it.
        setting: Arguments of its ``run``.
        destination: ``"touched"`` or ``"fresh"``: whether its destination memory was written before.
        measurements: One for each round.
        error: Why it is no longer measured.
    """

    contender: str
    worker: str
    setting: Mapping[str, Any]
    destination: str
    measurements: list[Measurement] = field(factory=list)
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return median([m.seconds for m in self.measurements])

    @property
    def cpu_seconds(self) -> float:
        """Median CPU time."""
        return median([m.cpu_seconds for m in self.measurements])

    def row(self, total_bytes: int, limit_seconds: float | None) -> dict[str, Any]:
        """Return the row of a table of loads of ``total_bytes``."""
        return {
            "contender": self.contender,
            "setting": " ".join(f"{key}={value}" for key, value in self.setting.items()),
            "destination": self.destination,
            "seconds": round(self.seconds, 4),
            "GB/s": round(total_bytes / self.seconds / 1e9, 3),
            "of limit": None if limit_seconds is None else round(limit_seconds / self.seconds, 3),
            "CPU-s/GB": round(self.cpu_seconds / total_bytes * 1e9, 3),
            "samples": [round(m.seconds, 4) for m in self.measurements],
            "details": dict(self.measurements[-1].details),
        }


def _back_free_memory(length: int) -> None:
    """Touch memory and free it again.

    On a virtual machine, memory that was freed some seconds ago may have returned to the host, and its first touch then
    takes ten times as long. After this call, a contender gets memory that the machine still has.
    """
    with mmap.mmap(-1, length) as memory:
        memory.madvise(_MADV_POPULATE_WRITE)


def measure(
    plan: Plan, workers: Mapping[str, Worker], entries: Sequence[Entry], expected: str
) -> tuple[list[Entry], list[Absent]]:
    """Measure all ``entries`` in rounds; the first round is not counted, and its bytes are compared with ``expected``.

    Returns:
        The entries that were measured in every round, and those that failed.
    """
    for number in range(plan.rounds + 1):
        plan.say(
            f"  round {number} of {plan.rounds}" + (" (not counted; the bytes are compared)" if not number else "")
        )
        # Another order in each round, so that no contender always follows the same one, which may leave cheap memory or
        # hot processors.
        for entry in random.Random(number).sample(entries, len(entries)):
            if entry.error is not None or entry.worker not in workers:
                continue
            if entry.destination == "fresh" and not plan.quick:
                _back_free_memory(_BACKED_BYTES)
            try:
                measurement = workers[entry.worker].run(digest=not number, **entry.setting)
            except (WorkerError, OSError) as exc:
                entry.error = str(exc)
                continue
            if number:
                entry.measurements.append(measurement)
            elif measurement.digest != expected:
                entry.error = f"it loaded wrong bytes: digest {measurement.digest}, not {expected}"
    absent = [
        Absent(f"{entry.contender} {dict(entry.setting)}", entry.error) for entry in entries if entry.error is not None
    ]
    return [entry for entry in entries if entry.error is None and entry.measurements], absent


@contextlib.contextmanager
def started(
    specifications: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, str]]],
) -> Iterator[tuple[dict[str, Worker], list[Absent]]]:
    """Start a worker for each ``name: (contender, arguments, environ)``; yield them, and those that did not start."""
    workers: dict[str, Worker] = {}
    absent: list[Absent] = []
    try:
        for name, (contender, arguments, environ) in specifications.items():
            try:
                workers[name] = Worker(contender, arguments, environ)
            except WorkerError as exc:
                absent.append(Absent(name, str(exc)))
        yield workers, absent
    finally:
        for worker in workers.values():
            worker.close()


# -- in the worker's process ------------------------------------------------------------------------------------------


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _serve(contender: str, arguments: Mapping[str, Any], answers: IO[str]) -> None:
    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    module, _, name = contender.partition(":")
    try:
        instance = getattr(importlib.import_module(module), name)(**arguments)
    except Exception as exc:  # noqa: BLE001 - any error is reported as the reason
        answer({"error": f"{type(exc).__name__}: {exc}"})
        return
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            cpu, begun = _cpu_seconds(), time.perf_counter()
            details = instance.run(**request["setting"])
            seconds, cpu = time.perf_counter() - begun, _cpu_seconds() - cpu
            digest = instance.digest() if request["digest"] else None
            instance.release()
        except Exception as exc:  # noqa: BLE001 - as above
            traceback.print_exc()
            answer({"error": f"{type(exc).__name__}: {exc}"})
            continue
        answer({"seconds": seconds, "cpu_seconds": cpu, "digest": digest, "details": details or {}})


def _main() -> None:
    # Output of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.argv[1], json.loads(sys.argv[2]), answers)


if __name__ == "__main__":
    _main()
