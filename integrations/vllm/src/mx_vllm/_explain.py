"""``mx explain-vllm``: shows where vLLM's weights would come from and why, without loading any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Annotated

import attrs
import typer
from attrs import frozen

import modelexpress_core as mx
from modelexpress_core import ModelExpressError, ModelURI, PluginManager
from modelexpress_core.cli.output import JsonOption, console, print_json, verbatim
from modelexpress_core.contracts.candidates import Skipped
from modelexpress_core.loader import Loader
from modelexpress_core.messages import hide_credentials
from modelexpress_core.report import format_bytes, format_files
from modelexpress_core.settings import from_env
from modelexpress_core.sources.discovery.finding import finds_workers
from modelexpress_core.uri import redacted
from mx_vllm._hub_models import HubName, find_in_cache, hub_directory, is_from_server, why_in_cache
from mx_vllm._names import content_of_snapshot, name_of
from mx_vllm._serve import default_directory
from mx_vllm.settings import VllmSettings

__all__ = ["explain"]

_STYLES = {"chosen": "bold green", "next": "", "possible": "green", "unusable": "red"}


@frozen
class Place:
    """A place that weights may come from.

    Attributes:
        place: Redacted URI, or the name of the model if vLLM finds its files.
        why: Why it is a candidate.
        status: ``"chosen"``, ``"next"`` (tried if those before it fail), ``"possible"`` (a worker that is read first if
            the whole identity is equal, which only a worker can compare) or ``"unusable"``.
        reader: The loader and plugin that would read it.
        tensors: Number of tensors; None if unknown.
        files: Number of files; None if unknown.
        bytes: Bytes of all tensors; None if unknown.
        problem: Why it is unusable; empty otherwise.
    """

    place: str
    why: str
    status: str
    reader: str
    tensors: int | None = None
    files: int | None = None
    bytes: int | None = None
    problem: str = ""


def explain(
    model: Annotated[
        str,
        typer.Argument(help="A directory or a name on the Hugging Face Hub, as for vLLM, or a URI.", metavar="MODEL"),
    ],
    json_output: JsonOption = False,
) -> None:
    """Show the places that `vllm serve MODEL --load-format mx` would try, best first, and which it would choose.

    Reads headers only, and downloads nothing. A server whose cache is used begins to download the model.
    """
    places = _ranked(model, from_env(VllmSettings, os.environ))
    usable = any(place.status == "chosen" for place in places)
    if json_output:
        print_json({"model": _shown(model), "usable": usable, "places": [attrs.asdict(place) for place in places]})
    else:
        _print(model, places)
    if not usable:
        raise typer.Exit(1)


def _ranked(model: str, settings: VllmSettings) -> list[Place]:
    """Mark the first usable place as chosen, and the usable ones after it as next."""
    places: list[Place] = []
    for place in _candidates(model, settings):
        chosen = any(before.status == "chosen" for before in places)
        places.append(attrs.evolve(place, status="next") if chosen and place.status == "chosen" else place)
    return places


def _candidates(model: str, settings: VllmSettings) -> Iterator[Place]:
    loader = Loader(None, PluginManager.discover())
    is_uri = "://" in model
    found, problem = _found(model, loader) if settings.model_uri is None and not is_uri else (None, None)
    yield from _workers(model, settings, found)
    if settings.model_uri is not None:
        yield from _opened(loader, settings.model_uri, "MX_MODEL_URI names it")
    elif is_uri:
        why = "it is the given URI; to serve it, set MX_MODEL_URI or run `mx vllm`"
        yield from _opened(loader, model, why)
    else:
        yield from _found_by_vllm(loader, model, found, problem)
    if not is_uri and settings.may_fall_back and not (found is not None and found.streamed):
        yield _fallback(model)


@frozen
class _Found:
    """Where the weights of vLLM's ``--model`` are.

    Attributes:
        uri: Their place.
        content_version: Of what is there; empty if nobody knows it.
        why: Why vLLM reads them there.
        streamed: Whether vLLM has none of its files, so that its own loader has nothing to read.
    """

    uri: str
    content_version: str
    why: str
    streamed: bool = False


def _found(model: str, loader: Loader) -> tuple[_Found | None, Place | None]:
    """Return where the weights of a directory or a name of the Hub are, and the server's cache if it cannot be used."""
    folder = model if os.path.isdir(model) else hub_directory(HubName(model))
    if folder is not None:
        where = "" if folder == model else ", in the cache of the Hugging Face Hub"
        why = f"vLLM finds it for its model{where}, and MX_MODEL_URI is not set"
        return _Found(folder, content_of_snapshot(os.path.abspath(folder)), why), None
    if not is_from_server(HubName(model), os.environ):
        return None, None
    why = "vLLM gets the configuration from there, and MX_MODEL_URI is not set"
    skipped: list[Skipped] = []
    try:
        place = find_in_cache(HubName(model), loader.plugins, os.environ, skipped.append)
    except ModelExpressError as exc:
        return None, Place(
            f"the cache of the server, for {_shown(model)}",
            "variables say so",
            "unusable",
            "ModelExpress",
            problem=str(exc),
        )
    return _Found(str(place.uri), place.content_version, why, place.directory is None), _first_skipped(skipped)


def _workers(model: str, settings: VllmSettings, found: _Found | None) -> Iterator[Place]:
    """Yield the workers of the model that a server lists, and why others are not read."""
    if not finds_workers(os.environ):
        return
    is_uri = "://" in model
    uri = settings.model_uri or (model if is_uri else "") or (found.uri if found is not None else "")
    if not uri:
        return
    name = default_directory(ModelURI.parse(model)).name if is_uri else name_of(model)
    content = found.content_version if found is not None and uri == found.uri else ""
    try:
        places = mx.explain(uri, model_name=name, content_version=content).places
    except ModelExpressError as exc:
        yield Place("other workers", "MODEL_EXPRESS_URL is set", "unusable", "ModelExpress", problem=str(exc))
        return
    for place in places:
        if not place.worker_id and place.place != "other workers":
            continue
        why = place.reason if place.status == "possible" else f"it holds {name}, or a part of it"
        problem = "" if place.status == "possible" else "; ".join(filter(None, (place.reason, place.hint)))
        yield Place(place.place, why, place.status, "ModelExpress, from the memory of a worker", problem=problem)


def _opened(loader: Loader, uri: str, why: str) -> Iterator[Place]:
    skipped: list[Skipped] = []
    request = attrs.evolve(loader.request(uri), on_skipped=skipped.append)
    for candidate in loader.candidates(request):
        place = str(candidate.uri)
        reason = ", and ".join(filter(None, (why_in_cache(place, os.environ), why)))
        try:
            checkpoint = loader.open_headers(candidate)
        except ModelExpressError as exc:
            yield Place(place, reason, "unusable", "ModelExpress", problem=str(exc))
            continue
        reader = f"ModelExpress, with {checkpoint.provider}"
        sizes = (len(checkpoint.tensors), len(checkpoint.files), checkpoint.tensor_bytes)
        yield Place(place, reason, "chosen", reader, *sizes)
    left_out = _first_skipped(skipped)
    if left_out is not None:
        yield left_out


def _first_skipped(skipped: Sequence[Skipped]) -> Place | None:
    """Return why the cache of the server is left out."""
    for each in skipped:
        problem = "; ".join(filter(None, (*each.reasons, each.hint)))
        return Place(each.place, "MODEL_EXPRESS_URL names it", "unusable", "ModelExpress", problem=problem)
    return None


def _found_by_vllm(loader: Loader, model: str, found: _Found | None, problem: Place | None) -> Iterator[Place]:
    if found is not None:
        yield from _opened(loader, found.uri, found.why)
    if problem is not None:
        yield problem
    if found is None:
        why = "MX_MODEL_URI is not set, and there is no such directory: vLLM downloads it from the Hugging Face Hub"
        yield Place(_shown(model), why, "chosen", "ModelExpress, after the download")


def _shown(model: str) -> str:
    """``model`` without credentials, which a URI may have."""
    return redacted(model) if "://" in model else hide_credentials(model)


def _fallback(model: str) -> Place:
    if os.path.isdir(model) and not _has_weights(model):
        problem = "the directory has no weights"
        return Place(_shown(model), "it is vLLM's model", "unusable", "vLLM's own loader", problem=problem)
    why = "if ModelExpress fails, vLLM's own loader reads the files of vLLM's model (MX_FALLBACK)"
    return Place(_shown(model), why, "chosen", "vLLM's own loader")


def _has_weights(folder: str) -> bool:
    return any(name.endswith((".safetensors", ".bin", ".pt")) for name in os.listdir(folder))


def _print(model: str, places: list[Place]) -> None:
    out = console()
    shown = _shown(model)
    command = f"mx vllm {shown}" if "://" in model else f"vllm serve {shown} --load-format mx"
    out.print(f"[bold]{verbatim(command)}[/]", soft_wrap=True)
    for number, place in enumerate(places, 1):
        style = _STYLES[place.status]
        status = f"[{style}]{place.status}[/]" if style else place.status
        out.print(f"\n{number}. {verbatim(place.place)}: {status}", soft_wrap=True)
        out.print(f"   because {verbatim(place.why)}", soft_wrap=True)
        if place.bytes is not None:
            size = f"{place.tensors} tensors, {format_bytes(place.bytes)} in {format_files(place.files or 0)}"
            out.print(f"   {size}, read by {verbatim(place.reader)}", soft_wrap=True)
        elif not place.problem:
            out.print(f"   read by {verbatim(place.reader)}", soft_wrap=True)
        for line in place.problem.splitlines():
            out.print(f"   {verbatim(line)}", style="red", soft_wrap=True)
    if all(place.status == "unusable" for place in places):
        out.print("\n[bold red]vLLM could not load the weights from any of these places.[/]")
