"""Write the parts of the Helm chart that follow from others: ``python -m devtools.helm_chart``.

``helm/values.schema.json`` holds each value's description and default. ``helm/values.yaml`` and the table in
``helm/README.md`` are written from it; the part ``config`` of the schema is written from the server's own settings.
``helm/files`` holds copies of files that templates need.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from devtools.packages import ROOT
from modelexpress_core.server.settings import CacheSettings, LimitSettings, LogSettings, ServerSettings
from modelexpress_core.settings import boolean, byte_count, field_names, positive_integer, seconds
from modelexpress_core.settings.declaring import fields

__all__ = ["CHART", "COPIES", "OWNED", "SECTIONS", "load_schema", "schema_text", "values_text", "with_table"]

CHART = ROOT / "helm"
_SCHEMA = CHART / "values.schema.json"

#: Sections of the server's configuration file that ``config`` takes. TLS and authentication have values of their own.
SECTIONS: Mapping[str, type] = {"": ServerSettings, "cache": CacheSettings, "limits": LimitSettings, "log": LogSettings}

#: Settings that templates set: ``config`` refuses them, so that no two values say different things.
OWNED: Mapping[str, frozenset[str]] = {
    "": frozenset({"host", "port", "metrics_port", "metrics_token", "health_port", "metadata", "drain_seconds"}),
    "cache": frozenset({"directory", "endpoint", "bulk_port", "max_bytes"}),
}

#: Copies for the chart, which must hold all that its templates read: from where, and the name in ``helm/files``.
COPIES: Mapping[str, Path] = {
    "grafana-dashboard.json": ROOT / "docs" / "grafana-dashboard.json",
    "crds.yaml": ROOT / "plugins" / "mx-kubernetes" / "src" / "mx_kubernetes" / "crds.yaml",
    "rbac.json": ROOT / "plugins" / "mx-kubernetes" / "src" / "mx_kubernetes" / "rbac.json",
}

_TABLE = re.compile(r"(<!-- values -->\n).*(<!-- end of values -->\n)", re.DOTALL)
_WIDTH = 118


# -- the schema --------------------------------------------------------------------------------------------------------


def load_schema() -> dict[str, Any]:
    """Return the schema as its file has it."""
    schema: dict[str, Any] = json.loads(_SCHEMA.read_text())
    return schema


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return the text of ``schema``, with ``config`` from the current settings of the server."""
    properties = {**schema["properties"]}
    properties["config"] = {**properties["config"], "properties": _config()}
    return json.dumps({**schema, "properties": properties}, indent=2, ensure_ascii=False) + "\n"


def _config() -> dict[str, Any]:
    top: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        keys = {name: kind for name, kind in _kinds(cls) if name not in OWNED.get(section, ())}
        if section:
            about = (cls.__doc__ or "").strip().splitlines()[0]
            top[section] = {
                "description": about,
                "type": "object",
                "additionalProperties": False,
                "properties": keys,
            }
        else:
            top |= keys
    return top


def _kinds(cls: type) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each field of a settings class with its schema."""
    for name, (_, variable) in zip(field_names(cls), fields(cls), strict=True):
        about = f"{variable.help} ({variable.names[0]})"
        if variable.converter is byte_count or name.endswith("_bytes"):
            kind: dict[str, Any] = {"type": "string", "pattern": "^[1-9][0-9]*[KMGT]i?B?$"}
        elif variable.converter is seconds:
            kind = {"type": ["number", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?s?$", "minimum": 0}
        elif variable.converter is boolean:
            kind = {"type": "boolean"}
        elif variable.converter is positive_integer:
            kind = {"type": "integer", "minimum": 1}
        elif name == "sources":
            kind = {"type": "array", "items": {"type": "string", "minLength": 1}}
        else:
            kind = {"type": "string"}
        yield name, {"description": about, **kind}


# -- values and their table --------------------------------------------------------------------------------------------


def values_text(schema: Mapping[str, Any]) -> str:
    """Return ``values.yaml``: each value with its default, below its description."""
    lines = [
        "# Values of the chart. Descriptions and defaults stand in values.schema.json, which also checks what you set;",
        "# `python -m devtools.helm_chart` writes this file from it.",
    ]
    for name, part in schema["properties"].items():
        lines += ["", *_value(name, part, "")]
    return "\n".join(lines) + "\n"


def _value(name: str, part: Mapping[str, Any], indent: str) -> Iterator[str]:
    for line in textwrap.wrap(
        part["description"], _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
    ):
        yield f"{indent}# {line}"
    if _is_group(part):
        yield f"{indent}{name}:"
        for inner, each in part["properties"].items():
            yield from _value(inner, each, indent + "  ")
    else:
        choices = f"  # {', '.join(part['enum'])}" if "enum" in part else ""
        yield f"{indent}{name}: {json.dumps(part.get('default', {}), ensure_ascii=False)}{choices}"


def _is_group(part: Mapping[str, Any]) -> bool:
    """Whether a value has values below it that have defaults."""
    return any("default" in each or "properties" in each for each in part.get("properties", {}).values()) and (
        "default" in next(iter(part["properties"].values()))
    )


def with_table(text: str, schema: Mapping[str, Any]) -> str:
    """Return ``text`` with the current table between its marks."""
    return _TABLE.sub(lambda marks: marks[1] + "\n".join(_rows(schema)) + "\n" + marks[2], text)


def _rows(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "\n| value | default | meaning |"
    yield "|---|---|---|"
    for name, part in schema["properties"].items():
        yield from _row(name, part)
    yield "\n## Values of config\n"
    yield "They are keys of the [configuration file](../docs/server.md#configuration), with the server's defaults.\n"
    yield "| value | meaning |"
    yield "|---|---|"
    for name, part in _config().items():
        inner = part.get("properties")
        for key, each in ((f"{name}.{key}", each) for key, each in inner.items()) if inner else ((name, part),):
            yield f"| `config.{key}` | {_cell(each['description'])} |"
    yield ""


def _row(path: str, part: Mapping[str, Any]) -> Iterator[str]:
    if _is_group(part):
        for name, each in part["properties"].items():
            yield from _row(f"{path}.{name}", each)
        return
    default = json.dumps(part.get("default", {}), ensure_ascii=False)
    shown = default if len(default) <= 40 else "see values.yaml"
    shown = "" if default in {'""', "{}", "[]"} else f"`{shown}`" if shown == default else shown
    choices = f" One of {', '.join(f'`{word}`' for word in part['enum'])}." if "enum" in part else ""
    yield f"| `{path}` | {_cell(shown)} | {_cell(part['description'])}{choices} |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def main() -> None:
    """Update the chart."""
    for name, origin in COPIES.items():
        (CHART / "files" / name).write_bytes(origin.read_bytes())
    _SCHEMA.write_text(schema_text(load_schema()))
    schema = load_schema()
    (CHART / "values.yaml").write_text(values_text(schema))
    page = CHART / "README.md"
    page.write_text(with_table(page.read_text(), schema))


if __name__ == "__main__":
    main()
