"""``mx explain``: shows where a load would read from, and why not from other places."""

from __future__ import annotations

from typing import Annotated

import typer

from modelexpress_core.cli.output import JsonOption, console, exit_code, print_json, silence_grpc, verbatim
from modelexpress_core.explaining import Explanation, Place
from modelexpress_core.explaining import explain as explained
from modelexpress_core.report import format_bytes, format_files

__all__ = ["explain"]

_STYLES = {"chosen": "bold green", "next": "", "possible": "yellow", "unusable": "red"}


def explain(
    uri: Annotated[
        str, typer.Argument(help="A directory, an index, one safetensors file, or a worker: a URI.", metavar="URI")
    ],
    model: Annotated[
        str | None, typer.Option(help="Show the workers that hold this model, too.", metavar="NAME")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the part that is needed.", metavar="N", min=0)] = 0,
    json_output: JsonOption = False,
) -> None:
    """Show where a load of URI would read from, in which order, and why not from other places.

    Reads headers, and asks servers and workers. It moves no weights.
    """
    silence_grpc()
    found = explained(uri, model_name=model or "", worker_rank=rank)
    if json_output:
        print_json(found.to_dict())
    else:
        _print(found)
    if found.error is not None:
        raise typer.Exit(exit_code(found.error))


def _print(found: Explanation) -> None:
    out = console()
    workers = f", by rank {found.worker_rank} of {found.model_name}" if found.model_name else ""
    out.print(f"[bold]a load of {verbatim(found.uri)}{verbatim(workers)}[/]", soft_wrap=True)
    for number, place in enumerate(found.places, 1):
        style = _STYLES[place.status]
        status = f"[{style}]{place.status}[/]" if style else place.status
        out.print(f"\n{number}. {verbatim(place.place)}: {status}", soft_wrap=True)
        for line in _lines(place):
            out.print(f"   {verbatim(line)}", soft_wrap=True)
    if found.error is not None:
        out.print("\n[bold red]No place can be read.[/]")


def _lines(place: Place) -> list[str]:
    lines = [place.reason] if place.reason else []
    if place.worker_id and place.worker_id not in place.place:
        lines.append(f"worker {place.worker_id}")
    if place.worker_id:
        lines.append(f"rank {place.worker_rank} of source {place.source_id}")
    if place.identity:
        lines.append("identity: " + ", ".join(f"{name} {value}" for name, value in place.identity.items()))
    if place.bytes is not None:
        size = f"{place.tensors} tensors, {format_bytes(place.bytes)} in {format_files(place.files or 0)}"
        version = (
            f"content version {place.content_version}"
            if place.content_version
            else "no content version that other machines see"
        )
        lines.append(f"{size}, {version}")
    if place.hint:
        lines.append(f"Next step: {place.hint}")
    return lines
