"""``mx health`` and ``mx sources``: show the state of a server, and the workers that it knows."""

from __future__ import annotations

import math
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from modelexpress_core.cli.interruption import signal_exit_code
from modelexpress_core.cli.output import JsonOption, console, package_missing, print_json, silence_grpc, verbatim
from modelexpress_core.report import format_bytes

if TYPE_CHECKING:
    from modelexpress_core.sources.client import ServerClient
    from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["health", "sources"]

_WATCH_SECONDS = 2.0

#: For a worker that the server returns for no known status: it was ready but has been silent for too long, so that the
#: server no longer offers it, or this version does not know its status.
_NO_STATUS = "silent or unknown"

UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="Call this server; by default MODEL_EXPRESS_URL, or localhost:8001.", metavar="URL"),
]


def health(url: UrlOption = None, json_output: JsonOption = False) -> None:
    """Show status, version and uptime of a server."""
    with _client(url) as client:
        begun = time.perf_counter()
        response = client.health()
        milliseconds = (time.perf_counter() - begun) * 1000
    if json_output:
        print_json({"status": response.status, "version": response.version, "uptime_seconds": response.uptime})
        return
    uptime = timedelta(seconds=response.uptime)
    text = f"{response.status}, version {response.version}, up {uptime}, answered in {milliseconds:.0f} ms"
    console().print(verbatim(text))


def sources(
    url: UrlOption = None,
    json_output: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh the list until Ctrl-C.")] = False,
    model: Annotated[str | None, typer.Option(help="List only workers of this model.", metavar="NAME")] = None,
    readers: Annotated[
        bool, typer.Option("--readers", help="Ask each worker who reads from it, over what and how fast.")
    ] = False,
) -> None:
    """List the workers that hold models, the latest heartbeat first."""
    with _client(url) as client:
        if json_output:
            print_json(_as_data(client, model, readers=readers))
        elif not watch:
            console().print(_shown(client, model, readers=readers))
        else:
            _watch(client, model, readers=readers)


def _watch(client: ServerClient, model: str | None, *, readers: bool) -> None:
    try:
        with Live(_shown(client, model, readers=readers), console=console(), auto_refresh=False) as live:
            while True:
                time.sleep(_WATCH_SECONDS)
                live.update(_shown(client, model, readers=readers), refresh=True)
    except KeyboardInterrupt as exc:  # the usual end, so without a message
        raise typer.Exit(signal_exit_code(exc)) from None


def _shown(client: ServerClient, model: str | None, *, readers: bool) -> RenderableType:
    rows = _as_data(client, model, readers=readers)
    return Group(_table(rows), "", _readers_table(rows)) if readers and rows else _table(rows)


def _as_data(client: ServerClient, model: str | None, *, readers: bool) -> list[dict[str, Any]]:
    from modelexpress_core.wire.proto.modelexpress import p2p_pb2

    listed = client.listing(p2p_pb2.ListSourcesRequest(model_name_filter=model))
    # A list contains no status, so each status is listed separately.
    statuses: dict[tuple[str, str], str] = {}
    for constant in p2p_pb2.SourceStatus.keys():  # noqa: SIM118 - no dictionary
        request = p2p_pb2.ListSourcesRequest(status_filter=constant, model_name_filter=model)
        name = constant.removeprefix("SOURCE_STATUS_").lower()
        statuses |= {(source.mx_source_id, source.worker_id): name for source in client.list_sources(request)}
    rows: list[dict[str, Any]] = [
        {
            "model": source.model_name,
            "status": statuses.get((source.mx_source_id, source.worker_id), _NO_STATUS),
            "rank": source.worker_rank,
            "worker_id": source.worker_id,
            "source_id": source.mx_source_id,
            "accelerator": source.accelerator,
            "load": _load(source),
            "publisher": source.publisher or None,
            "publisher_address": source.publisher_address or None,
            "updated_at_ms": source.updated_at,
        }
        for source in listed.instances
    ]
    if readers:
        from modelexpress_core.sources.reader_lists import ask_readers

        for row, answer in zip(rows, ask_readers(listed, os.environ, server=client.url), strict=True):
            row["readers"] = [attrs.asdict(each) for each in answer.readers]
            row["readers_left_out"], row["readers_problem"] = answer.left_out, answer.problem
    return rows


def _readers_table(rows: list[dict[str, Any]]) -> Table | str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("reader", "reads from", "over", "state"):
        table.add_column(column, overflow="fold")
    for column in ("bytes", "seconds", "rate"):
        table.add_column(column, justify="right")
    for row in rows:
        worker = verbatim(row["worker_id"])
        for reader in row["readers"]:
            nbytes, seconds, ended = reader["read_bytes"], reader["seconds"], reader["ended_seconds"]
            table.add_row(
                verbatim(reader["name"]),
                worker,
                verbatim(reader["transport"]),
                "reads" if ended is None else f"ended {ended:.0f} s ago",
                format_bytes(nbytes),
                f"{seconds:.1f}",
                f"{format_bytes(nbytes / seconds)}/s" if seconds > 0 else "",
            )
        if row["readers_left_out"]:
            table.add_row(f"and {row['readers_left_out']} more", worker)
        if row["readers_problem"]:
            table.add_row("?", worker, "", f"[red]{verbatim(row['readers_problem'])}[/]")
    return table if table.row_count else "no readers"


def _load(source: p2p_pb2.SourceInstanceRef) -> float | None:
    """Return the load that the worker reports; None if it reports none, or no finite number."""
    known = source.HasField("source_load") and math.isfinite(source.source_load)
    return round(source.source_load, 4) if known else None


def _table(rows: list[dict[str, Any]]) -> Table | str:
    if not rows:
        return "no sources"
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ["model", "status", "rank", "worker_id", "source_id", "accelerator", "load"]
    if any(row["publisher"] for row in rows):  # the server authenticates its callers
        columns += ["publisher", "publisher_address"]
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    table.add_column("silent for", justify="right")
    now = time.time()
    for row in rows:
        silent = max(0.0, now - float(str(row["updated_at_ms"])) / 1000)
        cells = ["" if row[column] is None else verbatim(str(row[column])) for column in columns]
        table.add_row(*cells, f"{silent:.0f} s")
    return table


def _client(url: str | None) -> ServerClient:
    silence_grpc()
    try:
        from modelexpress_core.sources.client import ServerClient
    except ModuleNotFoundError as exc:
        raise package_missing("a call to a server", exc) from exc
    return ServerClient.from_env(os.environ, url=url)
