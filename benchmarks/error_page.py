"""``python -m benchmarks.error_page``: write the tables of docs/error-messages.md from the committed results.

With ``--update``, provoke the failures again before, for our own messages in the results.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BOUND_SECONDS, PARTS, SETTINGS, refreshed

__all__ = ["PAGE", "RESULTS", "page_with_tables", "report"]

_ROOT = Path(__file__).resolve().parents[1]

#: The page, and the results that its tables show.
PAGE = _ROOT / "docs" / "error-messages.md"
RESULTS = Path(__file__).parent / "results" / "error-messages.json"

_BEGIN, _END = "<!-- tables of benchmarks/error_page.py -->\n", "<!-- end of the tables -->\n"

#: Characters of runai-model-streamer's message and log that are shown.
_MAX_CHARACTERS = 300


def report() -> Mapping[str, Any]:
    """The report of the benchmark ``errors`` in the results."""
    reports: Sequence[Mapping[str, Any]] = json.loads(RESULTS.read_text())["reports"]
    return next(found for found in reports if found["benchmark"] == "errors")


def page_with_tables(page: str, results: Mapping[str, Any]) -> str:
    """The page with the tables that show ``results``."""
    before, _, rest = page.partition(_BEGIN)
    after = rest.partition(_END)[2]
    return f"{before}{_BEGIN}\n{_tables(results)}\n{_END}{after}"


def _tables(results: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    parts = [_summary(rows)]
    for store in dict.fromkeys(row["store"] for row in rows):
        of_store = [row for row in rows if row["store"] == store]
        parts += [f"## {'Files' if store == 'file' else store}\n", _scores(of_store), _messages(of_store)]
    return "\n".join(parts)


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    most = len(PARTS)
    both = [row for row in rows if row["runai score"] is not None]
    wrong = sum(row["details"]["runai"]["message"] == "it loaded wrong bytes" for row in both)
    late = sum(row["runai seconds"] > BOUND_SECONDS for row in both)
    visible = [row for row in rows if row["details"]["doctor visible"]]
    settings = ", ".join(f"`{name}={value}`" for name, value in SETTINGS.items())
    score, alone, ours = (_mean(both, key) for key in ("runai score", "runai without its log", "score"))
    full = sum(row["score"] == most for row in rows)
    found = sum(bool(row["doctor"]) for row in visible)
    return f"""\
- {len(rows)} failures. ModelExpress has all {most} points in {full} of them; the longest time to a final error was
  {max(row["seconds"] for row in rows):.1f} s.
- `mx doctor` was asked about {len(visible)} of them, and finds the same cause in {found}.
- runai-model-streamer met {len(both)} of them. With its log, it has {score} points on average, and {alone} without;
  ModelExpress has {ours}. In {wrong} it returned wrong bytes without an error, in {late} there was no error within
  {BOUND_SECONDS:.0f} s.
- `s` was measured with {settings};
  `by default` with the default settings, many loads at a time. runai-model-streamer ran with its default settings, and
  was ended after 60 s.
"""


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{sum(row[key] for row in rows) / len(rows):.1f}"


def _scores(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| failure | error | points | s | by default | `mx doctor` fails at | runai: points | without log | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        doctor = row["doctor"] or ("-" if row["details"]["doctor visible"] else "not asked")
        cells = [
            row["failure"],
            f"`{row['error']}`",
            row["score"],
            _seconds(row["seconds"]),
            _seconds(row["by default"]),
            doctor,
            _shown(row["runai score"]),
            _shown(row["runai without its log"]),
            _seconds(row["runai seconds"]),
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _messages(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| failure | ModelExpress: what came back, likely cause, next step | runai-model-streamer |",
        "|---|---|---|",
    ]
    for row in rows:
        headline, *advice = row["details"]["message"].replace("*", r"\*").splitlines()
        ours = " ".join([_without_object(headline), *(f"*{_label(line)}*" for line in advice)])
        lines.append(_line([row["failure"], ours, _theirs(row["details"]["runai"])]))
    return "\n".join(lines) + "\n"


def _without_object(headline: str) -> str:
    """What came back; what was tried on which object comes before it in each message."""
    tried, _, seen = re.sub(r" \[\w+\]", "", headline).partition(": ")  # without names of exceptions
    return seen if tried.startswith("could not ") else headline


def _label(line: str) -> str:
    return line.removeprefix("Likely cause: ").removeprefix("Next step: ")


def _theirs(runai: Mapping[str, Any]) -> str:
    message = runai["message"].replace("Could not receive response from libstreamer due to: ", "")
    # The lines of its log but those that only report progress, or repeat the message.
    log = [
        line for line in runai["log"].splitlines() if "[INFO]" not in line and "Failed to read from file" not in line
    ]
    text = " ".join([message, *(f"Log: {line}" for line in log[:1])])
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}..."


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(_cell(str(cell)) for cell in cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _update() -> None:
    """Write our messages of today into the results."""
    content = json.loads(RESULTS.read_text())
    with tempfile.TemporaryDirectory(prefix="errors-") as scratch:
        for found in content["reports"]:
            found["rows"] = refreshed(found["rows"], Path(scratch))
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if "--update" in sys.argv[1:]:
        _update()
    PAGE.write_text(page_with_tables(PAGE.read_text(), report()))
