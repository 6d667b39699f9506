"""``mx doctor``: diagnoses why a model does not load, step by step."""

from __future__ import annotations

from typing import Annotated

import attrs
import typer
from rich.console import Console

from modelexpress_core.cli.output import JsonOption, console, print_json, verbatim_lines
from modelexpress_core.doctor import STEPS, Step, can_load, diagnose
from modelexpress_core.errors import InvalidURIError

__all__ = ["doctor"]

_MARKS = {"ok": "✓", "noted": "!", "failed": "✗", "skipped": "-"}
_STYLES = {"ok": "green", "noted": "yellow", "failed": "bold red", "skipped": "dim"}
_NAME_COLUMNS = max(map(len, STEPS))


def doctor(
    uri: Annotated[
        str,
        typer.Argument(
            help="A directory, an index, or one safetensors file: a URI or a path. Or a worker.", metavar="URI"
        ),
    ],
    json_output: JsonOption = False,
    timeout: Annotated[
        float, typer.Option(help="Time-out of one wait on the network.", min=0.1, metavar="SECONDS")
    ] = 5.0,
) -> None:
    """Diagnose why a model does not load: what each step finds, and for a failure the cause and the next step."""
    steps = []
    printer = _Printer(console())
    for step in diagnose(uri, timeout_seconds=timeout):
        steps.append(step)
        if not json_output:
            printer.add(step)
    printer.flush()
    loads = can_load(steps)
    if json_output:
        print_json({"uri": _shown(steps), "loads": loads, "steps": [attrs.asdict(step) for step in steps]})
    else:
        _print_verdict(printer.out, steps, loads=loads)
    if not loads:
        # As for other commands: what is no URI is wrong usage.
        raise typer.Exit(2 if any(step.error == InvalidURIError.__name__ for step in steps) else 1)


def _shown(steps: list[Step]) -> str | None:
    """The URI without secrets; None if it cannot be parsed."""
    return next((step.facts.get("uri") for step in steps if step.name == "uri"), None)


class _Printer:
    """Prints steps as they come; steps that are skipped for the same reason share a line."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self._marks = out.is_terminal and out.encoding.lower().startswith("utf")
        self._skipped: list[Step] = []

    def add(self, step: Step) -> None:
        if self._skipped and (step.status, step.seen) != ("skipped", self._skipped[0].seen):
            self.flush()
        if step.status == "skipped":
            self._skipped.append(step)
            return
        took = f" [dim]({step.milliseconds:.0f} ms)[/]" if step.milliseconds >= 1 else ""
        self._line(step.status, f"[bold]{step.name:<{_NAME_COLUMNS}}[/] {verbatim_lines(step.seen)}{took}")
        for label, advice in (("Likely cause", step.cause), ("Next step", step.hint)):
            if advice:
                end = "" if advice.endswith((".", "?", "!")) else "."
                self.out.print(f"    {label}: {verbatim_lines(advice)}{end}", soft_wrap=True)

    def flush(self) -> None:
        if self._skipped:
            names = ", ".join(step.name for step in self._skipped)
            self._line("skipped", f"[dim]{names}: {verbatim_lines(self._skipped[0].seen)}[/]")
            self._skipped.clear()

    def _line(self, status: str, text: str) -> None:
        mark = _MARKS[status] if self._marks else f"{status:<7}"
        self.out.print(f"[{_STYLES[status]}]{mark}[/] {text}", soft_wrap=True)


def _print_verdict(out: Console, steps: list[Step], *, loads: bool) -> None:
    failed = ", ".join(step.name for step in steps if step.status == "failed")
    if not loads:
        out.print(f"\n[bold red]The model cannot be loaded.[/] Failed: {failed}.", soft_wrap=True)
    elif failed:
        text = f"The model can be loaded, though this failed: {failed}. The storage uses another way."
        out.print(f"\n[bold yellow]{text}[/]", soft_wrap=True)
    else:
        out.print("\n[bold green]The model can be loaded.[/]")
