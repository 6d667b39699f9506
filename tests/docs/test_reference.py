"""The reference agrees with the code: settings, errors, hooks, records, contracts, events, reports, layers."""

from __future__ import annotations

import asyncio
import builtins
import doctest
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import attrs
import pytest
import typer
from prometheus_client import CollectorRegistry

import modelexpress_core as mx
from devtools import credential_matrices, credentials_reference, settings_reference
from devtools.credential_matrices import STORES, Store
from modelexpress_core import contracts, errors, events, hookspecs, providers
from modelexpress_core.cli.app import build_app
from modelexpress_core.contracts import authenticator as authenticator_contract
from modelexpress_core.contracts import candidates as candidate_contract
from modelexpress_core.contracts import metadata_store
from modelexpress_core.fetch import limiter
from modelexpress_core.plugins import PluginManager
from modelexpress_core.report import LoadReport
from modelexpress_core.server.metrics import CacheMetrics, ServerMetrics, SourceServiceMetrics
from modelexpress_core.sources.metrics import SourceMetrics, WorkerMetrics
from modelexpress_core.sources.settings import SELECTORS
from modelexpress_core.storage.memory import store
from tests.support.checkpoints import safetensors_file, tensor

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *ROOT.glob("plugins/*/README.md"),
    *ROOT.glob("integrations/*/README.md"),
    ROOT / "helm" / "README.md",
]

ERRORS = {name: getattr(errors, name) for name in errors.__all__}
HOOKS = {name: function for name, function in vars(hookspecs).items() if hasattr(function, "modelexpress_spec")}


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(text: str, heading: str) -> str:
    """The text below the heading ``## heading``, up to the next one."""
    assert f"\n## {heading}\n" in text, f"no heading {heading}"
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the tables in ``text`` whose first column is code, by that code: the other columns."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        first, *others = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] or [""]
        for name in re.findall(r"`([^`]+)`", first):
            assert name not in found, f"{name} has two rows"
            found[name] = others
    return found


def code(text: str) -> str:
    """The Python in ``text``."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def anchor(heading: str) -> str:
    """The anchor of a heading in links, as on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# -- every page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_headings_lead_to_one(path: Path) -> None:
    """The part after the # of a link is a heading of the page, or a line of the module, that it leads to."""
    dangling = []
    for target, mark in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", path.read_text()):
        if target.endswith(".py"):
            lines = (path.parent / target).read_text().splitlines()
            if not mark.startswith("L") or not 0 < int(mark[1:]) <= len(lines):
                dangling.append(f"{target}#{mark}")
            continue
        headings = re.findall(r"^#+ (.+)$", ((path.parent / target) if target else path).read_text(), re.MULTILINE)
        if mark not in {anchor(heading) for heading in headings}:
            dangling.append(f"{target}#{mark}")

    assert [] == dangling


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_errors_that_a_page_names_exist(path: Path) -> None:
    """Ours, those of metadata stores and authenticators, or Python's."""
    named = set(re.findall(r"\b[A-Z]\w+Error\b", path.read_text())) - {"InternalError"}  # a code of S3
    ours = set(ERRORS) | set(metadata_store.__all__) | set(authenticator_contract.__all__)

    assert set() == {name for name in named - ours if not hasattr(builtins, name)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_hooks_that_a_page_names_exist(path: Path) -> None:
    """A name that looks like a hook is one."""
    named = set(re.findall(r"\bmx_(?:register|rewrite|rank|load)\w*", path.read_text()))

    metrics = {name for name in named if name.endswith(("_seconds", "_total"))}
    assert set() == named - metrics - set(HOOKS) - {"mx_register_", "mx_load_"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_a_page_names_exist(path: Path) -> None:
    """Each command, with the options that are given to it."""
    app = build_app()
    group = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    text = path.read_text()
    lines = re.findall(r"`mx ([^`]+)`", text)
    lines += [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in _commands(block)]

    for line in lines:
        words = line.split("#")[0].partition(" -- ")[0].split()  # what follows is another program's
        known = {"--help", *(option for parameter in group.params for option in parameter.opts)}
        below: dict[str, Any] | None = commands
        for word in (word for word in words if not word.startswith("-")):
            if not below:
                break
            assert word in below, line
            known |= {option for parameter in below[word].params for option in parameter.opts}
            below = getattr(below[word], "commands", None)
        assert set() == {word for word in words if word.startswith("--")} - known, line


def _commands(block: str) -> list[str]:
    return [line.removeprefix("mx ") for line in block.splitlines() if line.startswith("mx ")]


def test_the_readme_links_every_page() -> None:
    """So that readers find all of docs/ from there."""
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", PAGES[0].read_text()))

    assert {path.name for path in DOCS.glob("*.md")} == linked


def test_the_places_in_contributing_exist() -> None:
    """Each path in the table: in the repository, in core, or beside the path before it."""
    table = section((ROOT / "CONTRIBUTING.md").read_text(), "Where things are")
    lost = []
    for line in re.findall(r"^\| .+ \| (.+) \|$", table, re.MULTILINE)[1:]:
        folders = [ROOT, ROOT / "modelexpress_core"]
        for path in re.findall(r"`([\w*/.-]+(?:/|\.py|\.md|\.toml))`", line):
            found = next((match for folder in folders for match in folder.glob(path)), None)
            if found is None:
                lost.append(path)
            else:
                folders.append(found if found.is_dir() else found.parent)

    assert [] == lost


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_those_that_are_read() -> None:
    """Variables, other names, defaults and meanings; written by ``python -m devtools.settings_reference``."""
    assert settings_reference.with_tables(page("settings.md")) == page("settings.md")


def test_every_setting_is_there() -> None:
    """Of core and of every plugin of this repository, and no other."""
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", page("settings.md").partition("<!-- tables -->")[2]))
    classes = [*settings_reference.classes()]
    plugins = {path.name for path in (ROOT / "plugins").iterdir()}

    assert {name for _, cls in classes for name in settings_names(cls)} == listed
    assert plugins <= {owner for owner, _ in classes}


def settings_names(cls: type) -> tuple[str, ...]:
    from modelexpress_core.settings import variables

    return variables(cls)


# -- credentials -------------------------------------------------------------------------------------------------------


def test_credentials_are_those_of_the_matrices() -> None:
    """The tables are written by ``python -m devtools.credentials_reference``."""
    assert credentials_reference.with_tables(page("credentials.md")) == page("credentials.md")


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.package)
def test_every_cell_of_the_credentials_is_tested(store: Store) -> None:
    """The package has a test of all cases of its matrix, and one with the doctor."""
    name = next(name for name, value in vars(credential_matrices).items() if value is store)
    tests = (ROOT / "plugins" / store.package / "tests" / "test_matrix.py").read_text()

    assert f"{name}.cases())" in tests
    assert f"{name}.cases(doctor=True)" in tests


def test_variables_of_credentials_are_settings() -> None:
    """Each variable on the page is read by a storage, or by azure-identity."""
    named = set(re.findall(r"`?\b((?:AWS|AZURE|GOOGLE|GCE|HF|NO_GCE|STORAGE|MX)_[A-Z0-9_]+)\b", page("credentials.md")))
    known = {name for _, cls in settings_reference.classes() for name in settings_names(cls)}

    assert {"AZURE_TOKEN_CREDENTIALS"} == named - known


# -- errors ------------------------------------------------------------------------------------------------------------


def drawn(text: str) -> dict[str, str]:
    """The parent of each class in the tree that is drawn in ``text``."""
    parents: dict[str, str] = {}
    path: list[str] = []
    margin, tree = re.split(r"^( *)(?=ModelExpressError$)", text, maxsplit=1, flags=re.MULTILINE)[1:]
    pattern = rf"^(?:{margin})((?:[│ ] {{3}})*(?:[├└]── )?)(\w+Error)\b"
    for indent, name in re.findall(pattern, margin + tree, re.MULTILINE):
        depth = len(indent) // 4
        path[depth:] = [name]
        if depth:
            parents[name] = path[depth - 1]
    return parents


@pytest.mark.parametrize("text", [errors.__doc__ or "", page("errors.md")], ids=["errors.py", "errors.md"])
def test_the_tree_that_is_drawn_is_the_real_one(text: str) -> None:
    """Every class, below the class that it is derived from."""
    real = {name: cls.__base__.__name__ for name, cls in ERRORS.items() if cls is not mx.ModelExpressError}

    assert real == drawn(text.partition("## ")[0])


def test_every_error_is_explained() -> None:
    """When it is raised, what to do, and whether reads are tried again as the class says."""
    table = rows(page("errors.md"))
    known = {name: cells for name, cells in table.items() if name in ERRORS}

    assert list(ERRORS) == sorted(known)
    for name, (raised, remedy, retried) in known.items():
        assert raised, name
        assert remedy, name
        assert ("yes" if getattr(ERRORS[name], "default_retryable", False) else "no") == retried, name


def test_attributes_of_errors_exist() -> None:
    """Each ``.name`` that the page gives an error is set by its class."""
    attributes = set(re.findall(r"`\.(\w+)`", page("errors.md")))
    known = {name for cls in ERRORS.values() for name in inspect.signature(cls).parameters} | {"attempts"}

    assert attributes
    assert set() == attributes - known


def test_the_example_of_errors_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Line by line."""
    program = code(page("errors.md"))

    exec(compile(program, "errors.md", "exec"), {})

    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\)  # (.+)", program)
    assert promised == printed[: len(promised)]
    assert len(promised) == 3


# -- hooks -------------------------------------------------------------------------------------------------------------


def kind(hook: str) -> str:
    if HOOKS[hook].modelexpress_spec["firstresult"]:
        return "Policy"
    return "Register" if hook.startswith("mx_register_") else "Observe"


@pytest.mark.parametrize("heading", ["Register", "Policy", "Observe"])
def test_every_hook_is_in_the_table_of_its_kind(heading: str) -> None:
    """With one line that says what it does; no other hook is there."""
    table = rows(section(page("hooks.md"), heading))

    assert {hook for hook in HOOKS if kind(hook) == heading} == set(table)
    assert all(meaning for (meaning,) in table.values())


def test_the_tables_link_each_hook_to_its_specification() -> None:
    """The line of each link is that of the function in ``hookspecs.py``."""
    lines = Path(hookspecs.__file__).read_text().splitlines()
    expected = {hook: number for number, line in enumerate(lines, 1) for hook in re.findall(r"^def (mx_\w+)", line)}

    linked = re.findall(r"\[`(\w+)`\]\(\.\./modelexpress_core/hookspecs\.py#L(\d+)\)", page("hooks.md"))

    assert expected == {hook: int(number) for hook, number in linked}


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_every_hook_says_when_it_is_called(hook: str) -> None:
    """Its docstring says when it is called, and when not."""
    words = " ".join((inspect.getdoc(HOOKS[hook]) or "").partition("Example:")[0].split())

    assert re.search(r"\bCalled\b", words)
    assert re.search(r"\b(Not|Never) (called|used)\b", words)


def example(hook: str) -> types.ModuleType:
    """A module of the code of the example in the hook's docstring."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(HOOKS[hook]) or "")
    module = types.ModuleType(f"example_{hook}")
    exec(compile("".join(part.source for part in examples), f"hookspecs.py: {hook}", "exec"), vars(module))
    return module


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_the_example_of_every_hook_is_a_plugin(hook: str) -> None:
    """It implements that hook alone, and loads."""
    module = example(hook)

    info = PluginManager().register(module, name="mx-example")

    assert "loaded" == info.status
    assert [hook] == [name for name in vars(module) if name in HOOKS]
    assert (kind(hook) == "Register") == bool(info.schemes)


def test_the_example_of_the_page_is_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    """It loads and observes a failure."""
    module = types.ModuleType("example_of_page")
    exec(compile(code(page("hooks.md")), "hooks.md", "exec"), vars(module))
    manager = mx.PluginManager.discover({})

    info = manager.register(module, name="mx-example")
    with pytest.raises(mx.NotFoundError):
        mx.load_state_dict("memory://hooks-page/none.safetensors", environ={}, plugins=manager)

    assert "loaded" == info.status
    assert "memory://hooks-page/none.safetensors: NotFoundError after 0." in capsys.readouterr().out


def test_the_examples_of_policies_decide() -> None:
    """As their comments say."""
    manager = PluginManager()
    for hook in ("mx_rewrite_uri", "mx_rank_candidates"):
        manager.register(example(hook), name=hook.replace("_", "-"))
    candidates = [
        candidate_contract.Candidate(mx.ModelURI.parse(uri)) for uri in ("s3://bucket/model", "/models/model")
    ]

    ranked = manager.rank_candidates(candidate_contract.LoadRequest(candidates[0].uri), candidates)

    assert "s3://company-models/llama/v3" == str(manager.rewrite_uri(mx.ModelURI.parse("models://llama/v3"), {}))
    assert ["file", "s3"] == [candidate.uri.scheme for candidate in ranked]


def test_the_example_of_authenticators_authenticates() -> None:
    """It names a caller with the password, and refuses another."""
    record = example("mx_register_authenticators").mx_register_authenticators()[0]
    authenticator = record.factory({"PASSWORD": "swordfish"})

    assert "worker" == asyncio.run(authenticator.authenticate(authenticator_contract.Call(token="swordfish")))
    with pytest.raises(authenticator_contract.RefusedError, match="wrong password"):
        asyncio.run(authenticator.authenticate(authenticator_contract.Call(token="tuna")))


def test_the_examples_of_observers_observe(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples print what happens in a successful and in a failed load, and none of them raises."""
    manager = mx.PluginManager.discover({})
    for hook in HOOKS:
        if kind(hook) == "Observe":
            manager.register(example(hook), name=hook.replace("_", "-"))
    store("hooks-page").put("model.safetensors", safetensors_file({"weight": tensor("F32", (4, 4))}))

    mx.load_state_dict("memory://hooks-page/model.safetensors", environ={}, plugins=manager)
    with pytest.raises(mx.NotFoundError):
        mx.load_state_dict("memory://hooks-page/nothing.safetensors", environ={}, plugins=manager)

    printed = capsys.readouterr().out
    assert [] == caplog.records
    assert "loading 1 tensors from memory://hooks-page/model.safetensors\n" in printed
    assert "64 of 64 bytes, limited by " in printed
    assert "bytes/s from memory://hooks-page/model.safetensors\n" in printed
    assert "memory://hooks-page/nothing.safetensors: NotFoundError after 0." in printed


# -- records, contracts and events -------------------------------------------------------------------------------------

CONTRACTS = {
    name: importlib.import_module(f"modelexpress_core.contracts.{name}")
    for _, name, _ in pkgutil.iter_modules(contracts.__path__)
}

#: Modules whose docstrings are the reference of what hooks return and get, by their path in ``modelexpress_core``.
REFERENCE = {
    "providers.py": providers,
    "events.py": events,
    **{f"contracts/{name}.py": module for name, module in CONTRACTS.items()},
}


def classes(wanted: Callable[[type], bool]) -> list[type]:
    """The public classes of the reference that are ``wanted``."""
    public = {getattr(module, name): None for module in REFERENCE.values() for name in module.__all__}
    return [cls for cls in public if isinstance(cls, type) and wanted(cls)]


def explained(cls: type, heading: str = "Attributes") -> dict[str, str]:
    """What the docstring of ``cls`` says about each name below ``heading``."""
    text = (inspect.getdoc(cls) if "__doc__" in vars(cls) else None) or ""
    below = re.search(rf"^{heading}:\n((?:(?:    .*)?\n?)*)", text, re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", below[1] if below else "", re.MULTILINE)
    assert len(found) == len(dict(found)), f"{cls.__name__} explains a name twice"
    return {name: " ".join(meaning.split()) for name, meaning in found}


def test_the_page_lists_every_module_of_the_reference() -> None:
    """With a link, and with every name that the module makes public."""
    text = section(page("hooks.md"), "Records, contracts and events")
    listed = {
        target: set(re.findall(r"`(\w+)`", names))
        for target, names in re.findall(
            r"^\| \[[^]]+\]\(\.\./modelexpress_core/(.+?)\) \| (.+) \|$", text, re.MULTILINE
        )
    }

    assert {path: set(module.__all__) for path, module in REFERENCE.items()} == listed


@pytest.mark.parametrize("cls", classes(attrs.has), ids=lambda cls: str(cls.__name__))
def test_every_field_of_every_record_is_explained(cls: type) -> None:
    """In its docstring, in order. The docstring names a base that explains further fields."""
    base = cls.__base__
    inherited = {field.name for field in attrs.fields(base)} if attrs.has(base) else set()
    own = [field.name for field in attrs.fields(cls) if field.name not in inherited]

    assert own == list(explained(cls))
    assert all(explained(cls).values())
    assert not inherited or f"``{base.__name__}``" in (cls.__doc__ or "")


def is_protocol(cls: type) -> bool:
    return bool(getattr(cls, "_is_protocol", False))


@pytest.mark.parametrize("cls", classes(is_protocol), ids=lambda cls: str(cls.__name__))
def test_every_member_of_every_contract_is_explained(cls: type) -> None:
    """Methods by their docstrings, attributes in that of the class."""
    members = {name: member for name, member in vars(cls).items() if not name.startswith("_")}

    assert members or inspect.get_annotations(cls)
    assert [] == [name for name, member in members.items() if not inspect.getdoc(member)]
    assert set(inspect.get_annotations(cls)) == set(explained(cls))


STORAGES = [
    "Storage",
    "BatchStorage",
    "RunStorage",
    "RecheckingStorage",
    "ComparingStorage",
    "RestrictedStorage",
    "PatientStorage",
    "DiagnosableStorage",
]


@pytest.mark.parametrize("name", STORAGES)
def test_every_optional_storage_contract_names_its_capability(name: str) -> None:
    """The capability exists, and explains that it stands for this contract."""
    cls = getattr(CONTRACTS["storage"], name)

    capability = re.search(r"with\s+the\s+capability\s+``(\w+)``", cls.__doc__ or "")

    assert (capability is not None) == (name != "Storage")
    if capability is not None:
        assert hasattr(providers.StorageCapabilities(), capability[1])
        assert f"``{name}``" in explained(providers.StorageCapabilities)[capability[1]]


def test_every_optional_storage_contract_is_checked() -> None:
    """The list above has all of them."""
    storages = {cls.__name__ for cls in classes(is_protocol) if CONTRACTS["storage"].Storage in cls.__mro__}

    assert set(STORAGES) == storages


# -- design and tuning -------------------------------------------------------------------------------------------------


def test_the_layers_are_those_that_are_checked() -> None:
    """The table of modules has every layer of the import contract, from top to bottom."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [set(layer.split(" | ")) for layer in contracts[0]["layers"]]
    table = page("design.md").partition("## Modules")[2]
    shown = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines() if line.startswith("| `")]

    assert [layer - {"__main__"} for layer in layers] == shown


def test_the_picture_of_the_rooms_shows_the_layers() -> None:
    """Each row has the modules of one layer or of several that follow one another, from top to bottom."""
    imports = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [set(layer.split(" | ")) - {"__main__"} for layer in imports[0]["layers"]]
    picture = section(page("design.md"), "The rooms")
    shown = [set(modules.split()) for modules in re.findall(r"^│ [^│]+│ ([^│]+)│$", picture, re.MULTILINE)]

    assert len(shown) > 10
    for row in shown:
        taken: set[str] = set()
        while layers and taken < row:
            taken |= layers.pop(0)
        assert taken == row
    assert [] == layers


def test_every_field_of_a_report_is_explained() -> None:
    """In the page on tuning."""
    table = rows(page("tuning.md").partition("## Reading a report")[2].partition("\n## ")[0])

    assert {field.name for field in attrs.fields(LoadReport)} == set(table)


def test_every_metric_of_the_server_is_explained() -> None:
    """In the page on the server, with its labels."""
    text = page("server.md").partition("\n## Metrics\n")[2].partition("\n## ")[0]

    registry = ServerMetrics().registry
    SourceServiceMetrics(registry)
    CacheMetrics(registry, _no_stats)
    assert registered(registry) == explained_metrics(text)


def test_every_metric_of_the_search_for_peers_is_explained() -> None:
    """In the section on choosing a source, with its labels."""
    registry = CollectorRegistry()
    SourceMetrics(registry)

    text = page("server.md").partition("\n## Choosing a source\n")[2].partition("\n## ")[0]
    assert registered(registry) == explained_metrics(text)


def test_every_metric_of_a_worker_that_is_read_is_explained() -> None:
    """In the page on reading from other workers, with its labels."""
    registry = CollectorRegistry()
    WorkerMetrics(registry)

    assert registered(registry) == explained_metrics(page("peers.md"))


def test_every_selector_is_explained() -> None:
    """In the same place."""
    text = page("server.md").partition("| `MX_P2P_SOURCE_SELECTOR` |")[2].partition("\n\n")[0]

    assert set(SELECTORS) == set(rows(text))


def _no_stats() -> NoReturn:
    raise NotImplementedError  # the names of metrics are read, and never their values


def registered(registry: CollectorRegistry) -> dict[str, set[str]]:
    """The labels of each metric, by the name that it is scraped under."""
    return {
        f"{metric.name}_total" if metric.type == "counter" else metric.name: set(getattr(collector, "_labelnames", ()))
        for collector in set(registry._collector_to_names)
        for metric in collector.describe()
    }


def explained_metrics(text: str) -> dict[str, set[str]]:
    table = re.findall(r"^\| `(mx_\w+)` \| (.*?) \|", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in table}


def test_every_limiter_is_explained() -> None:
    """In the page on tuning, with what helps."""
    table = rows(page("tuning.md").partition("## What limits a load")[2].partition("\n## ")[0])

    assert {f"{name}" or '""' for name in limiter.Limiter.__args__} == set(table)  # type: ignore[attr-defined]


def test_every_setting_of_a_load_is_in_the_page_on_tuning() -> None:
    """Each has a row with a reason to set it."""
    table = rows(page("tuning.md").partition("## What to set when")[2].partition("\n## ")[0])

    from modelexpress_core.settings import LoadSettings

    own = {name for name in settings_names(LoadSettings) if name.startswith("MX_")}
    assert own == set(table)


def test_the_picture_names_the_steps_of_the_text() -> None:
    """The seven steps, in order, in both."""
    text = [step.lower() for step in re.findall(r"^\d\. \*\*(\w+)\.\*\*", page("design.md"), re.MULTILINE)]
    picture = re.findall(r">\d  (\w+)<", page("load.svg"))

    assert 7 == len(text)
    assert text == picture
