"""The configuration file of the server: strict YAML; all mistakes are reported at once, each with its line.

Fields of ``ServerSettings`` are at the top, and fields of other settings classes in sections::

    port: 8001
    metadata: redis://redis:6379/0
    log:
      format: json
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import attrs
import yaml
from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import (
    FileValue,
    Override,
    SettingSources,
    SettingValue,
    describe,
    field_names,
    find_problems,
    from_sources,
    usable_values,
)

__all__ = ["Config", "read_config"]

_T = TypeVar("_T")

#: A longer file is no configuration.
_MAX_BYTES = 1 << 20

#: Errors of PyYAML for an explicit tag that does not fit its value.
_NO_VALUE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, yaml.YAMLError)

_SWITCH = "tag:yaml.org,2002:bool"


@frozen
class Config:
    """The settings of the server, and the source of each.

    Attributes:
        sections: Settings class of each section of the file; the empty name stands for the top.
        sources: Sources of the fields of each section.
    """

    sections: Mapping[str, type]
    sources: Mapping[str, SettingSources]

    def get(self, cls: type[_T]) -> _T:
        """The settings of ``cls``, the class of a section."""
        return from_sources(cls, self.sources[self._name(cls)])

    def usable(self, cls: type) -> Mapping[str, tuple[Any, str]]:
        """The fields of ``cls`` that are set to a usable value, with the value and its source."""
        return usable_values(cls, self.sources[self._name(cls)])

    def defaults(self, cls: type) -> tuple[str, ...]:
        """The fields of ``cls`` that are not set."""
        rows = zip(field_names(cls), describe(cls, self.sources[self._name(cls)], owner=""), strict=True)
        return tuple(key for key, value in rows if value.source == "default")

    def with_fallbacks(self, cls: type, fallbacks: Mapping[str, Override]) -> Config:
        """The same, with ``fallbacks`` in place of the defaults of some fields of ``cls``."""
        name = self._name(cls)
        sources = attrs.evolve(self.sources[name], fallbacks=fallbacks)
        return Config(self.sections, {**self.sources, name: sources})

    def describe(self, owner: str) -> tuple[tuple[str, SettingValue], ...]:
        """Every setting by its key in the file, with its value and source."""
        return tuple(
            (_joined(name, key), value)
            for name, cls in self.sections.items()
            for key, value in zip(field_names(cls), describe(cls, self.sources[name], owner=owner), strict=True)
        )

    def _name(self, cls: type) -> str:
        return next(name for name, each in self.sections.items() if each is cls)


def read_config(
    sections: Mapping[str, type],
    environ: Mapping[str, str],
    *,
    path: str | None = None,
    overrides: Mapping[str, Override] | None = None,
    also: Iterable[type] = (),
    complete: Callable[[Config], tuple[Config, Iterable[str]]] | None = None,
) -> Config:
    """Settings from flags, variables and a file; the first of them that has a value wins.

    Args:
        sections: Settings class of each section of the file; the empty name stands for the top.
        environ: Variables.
        path: The file; none by default.
        overrides: Flags, by key in the file: ``"log.level"``.
        also: Settings classes that only variables set; they are checked, too.
        complete: Called with the configuration, usable or not. Returns the one to use instead, and further problems,
            such as settings that do not fit together.

    Raises:
        SettingsError: The file cannot be read, or values cannot be used; all of them are named, without secrets.
    """
    reader = _Reader(path or "", sections)
    if path is not None:
        reader.read(_document(path))
    flags = overrides or {}
    sources = {
        name: SettingSources(
            environ,
            file_values=reader.file_values[name],
            overrides={key: flags[_joined(name, key)] for key in field_names(cls) if _joined(name, key) in flags},
        )
        for name, cls in sections.items()
    }
    problems = [*reader.problems]
    problems += [problem for name, cls in sections.items() for problem in find_problems(cls, sources[name])]
    problems += [problem for cls in also for problem in find_problems(cls, SettingSources(environ))]
    config = Config(sections, sources)
    if complete is not None:
        config, more = complete(config)
        problems += more
    if problems:
        message = "settings that cannot be used:\n  " + "\n  ".join(problems)
        raise SettingsError(message, hint="correct them; `mx serve --check` tells whether all can be used")
    return config


def _joined(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


# -- reading the file --------------------------------------------------------------------------------------------------


def _document(path: str) -> yaml.MappingNode:
    """The mapping in the file.

    Messages quote nothing of it: it may hold secrets, and a typing error may put them anywhere.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise _unreadable(path, exc.strerror or str(exc)) from exc
    except ValueError as exc:
        raise _unreadable(path, "it is no path") from exc
    if len(data) > _MAX_BYTES:
        raise _unreadable(path, "it is longer than 1 MiB")
    try:
        node = yaml.compose(data.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise _unreadable(path, "it is no text in UTF-8") from None  # whose text has the whole content
    except yaml.MarkedYAMLError as exc:
        line = "" if exc.problem_mark is None else f"line {exc.problem_mark.line + 1}: "
        raise _unreadable(path, f"{line}{_without_content(exc)}") from None
    except yaml.YAMLError:
        raise _unreadable(path, "it is no YAML") from None
    except RecursionError:
        raise _unreadable(path, "it is nested too deeply") from None
    if not isinstance(node, yaml.MappingNode):
        is_now = "is empty" if node is None else "holds no mapping"
        raise _unreadable(path, f"it {is_now}; expected lines such as `port: 8001`, or {{}} where nothing is set")
    return node


def _without_content(exc: yaml.MarkedYAMLError) -> str:
    """What is wrong with the YAML, quoting no more than one character."""
    if not isinstance(exc, (yaml.scanner.ScannerError, yaml.parser.ParserError)):
        return "one document without aliases is expected"
    problem = exc.problem or ""
    # Kinds of tokens are in pointed brackets, and one character follows a backslash.
    words = (text for text in re.findall(r"'([^']*)'", problem) if len(text) > 1)
    return problem if all(text.startswith(("<", "\\")) for text in words) else "it is no YAML from there on"


def _unreadable(path: str, reason: str) -> SettingsError:
    return SettingsError(
        f"the configuration {path} cannot be read: {reason}", hint="check --config or MX_SERVER_CONFIG, and the file"
    )


class _Reader:
    """Reads the values of a file, by section and key, and collects problems.

    Args:
        path: The file, for messages.
        sections: Settings class of each section.
    """

    def __init__(self, path: str, sections: Mapping[str, type]) -> None:
        self._path = path
        self._sections = sections
        self.file_values: dict[str, dict[str, FileValue]] = {name: {} for name in sections}
        self.problems: list[str] = []

    def read(self, document: yaml.MappingNode) -> None:
        """Read the whole file, in spite of problems."""
        for key, node, line in self._items(document, ""):
            if not key or key not in self._sections:
                self._note("", key, node, line)
            elif isinstance(node, yaml.MappingNode):
                for inner, value, at in self._items(node, key):
                    self._note(key, inner, value, at)
            else:
                expected = ", ".join(field_names(self._sections[key]))
                self._wrong(line, f"{key}: expected a mapping with some of {expected}")

    def _items(self, mapping: yaml.MappingNode, section: str) -> Iterable[tuple[str, yaml.Node, int]]:
        """Keys and values of ``mapping`` with their lines.

        A key that occurs twice is a problem: PyYAML would take the last.
        """
        lines: dict[str, int] = {}
        for key, value in mapping.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                self._wrong(line, "a key that is no text")
            elif key.value in lines:
                self._wrong(line, f"{_joined(section, key.value)} is in line {lines[key.value]} already")
            else:
                lines[key.value] = line
                yield key.value, value, line

    def _note(self, section: str, key: str, node: yaml.Node, line: int) -> None:
        full = _joined(section, key)
        if key not in field_names(self._sections[section]):
            self._wrong(line, f"nothing is called {full}{self._guess(section, key)}")
            return
        try:
            value = _value(node, set())
        except _NO_VALUE:
            self._wrong(line, f"{full}: the value (not shown) cannot be read")
        else:
            word = node.value if node.tag == _SWITCH and isinstance(node, yaml.ScalarNode) else None
            self.file_values[section][key] = FileValue(value, full, f"{self._path}, line {line}", word)

    def _guess(self, section: str, key: str) -> str:
        """What ``key`` may be meant for: a similar key of its section, the same key of another, or else all keys."""
        here = [*field_names(self._sections[section]), *(name for name in self._sections if name and not section)]
        near = [_joined(section, each) for each in difflib.get_close_matches(key, here, n=1)]
        near += [_joined(name, key) for name, cls in self._sections.items() if key in field_names(cls)]
        return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(here)}"

    def _wrong(self, line: int, problem: str) -> None:
        self.problems.append(f"{self._path}, line {line}: {problem}")


def _value(node: yaml.Node, seen: set[int]) -> Any:  # noqa: ANN401 - any value of YAML
    """The value of ``node``. An alias is refused: it may make a list or mapping that contains itself."""
    if isinstance(node, yaml.CollectionNode):
        if id(node) in seen:
            reason = "an alias"
            raise ValueError(reason)
        seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_value(each, seen) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in mapping:
                reason = "a key that occurs twice, or is no text"
                raise ValueError(reason)
            mapping[key.value] = _value(value, seen)
        return mapping
    return yaml.constructor.SafeConstructor().construct_object(node)
