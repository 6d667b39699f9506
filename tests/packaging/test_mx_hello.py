"""The example of a third-party plugin, as its users get it: a wheel, pip, its own tests, and a load through it."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tokenize
import venv
from pathlib import Path
from typing import Any

import pytest

from modelexpress_core.testing import StorageContract
from tests.support.checkpoints import safetensors_file, tensor

pytestmark = pytest.mark.xdist_group("mx-hello")

_ROOT = Path(__file__).resolve().parents[2]
_EXAMPLE = _ROOT / "examples" / "mx-hello"
_TEXT = _ROOT / "docs" / "write-a-plugin.md"

_LOAD = """
import json, sys
import modelexpress_core as mx

state = mx.load_state_dict(sys.argv[1], environ={"MX_PLUGINS": "mx-hello", "MX_STRICT_PLUGINS": "1"})
print(json.dumps({name: bytes(value.untyped_storage()).hex() for name, value in state.items()}))
"""


#: The contract for all that the text offers beyond the required.
_MORE = """
import pytest
import test_contract
from modelexpress_core.testing import StorageContract


class Offering(WithDigests, WithDiagnosis):
    pass


test_contract.HelloStorage = Offering


class TestOffering(test_contract.TestHelloStorage):
    pass


class TestRuns(StorageContract):
    @pytest.fixture
    def storage(self):
        return WithRuns()

    @pytest.fixture
    def put(self, storage):
        return storage.put


class TestBatches(StorageContract):
    @pytest.fixture
    def storage(self):
        return WithBatches()

    @pytest.fixture
    def put(self, storage):
        return storage.put


def test_capabilities():
    assert all((capabilities.patience, capabilities.diagnosis, capabilities.read_runs, capabilities.stat_digests))
"""


def run(*command: str | Path, cwd: Path) -> str:
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_CONFIG_FILE": os.devnull}
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("MX_", "PIP_", "PYTHON", "PYTEST"))
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ | quiet, capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, away from this repository and its settings."""
    project = tmp_path_factory.mktemp("third-party") / "mx-hello"
    shutil.copytree(_EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__", ".*", "dist", "*.egg-info"))
    return project


@pytest.fixture(scope="module")
def python(project: Path) -> Path:
    """The interpreter of a fresh environment into which pip installed the example's wheel, without the network."""
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-deps", "--no-index", "--quiet")
    run(*pip, "wheel", "--no-build-isolation", *offline, "--wheel-dir", project / "dist", project, cwd=project)
    (wheel,) = (project / "dist").glob("mx_hello-*.whl")
    root = project.parent / "venv"
    venv.create(root, with_pip=False, symlinks=True)
    (here,) = (root / "lib").glob("python*/site-packages")
    seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # What is installed where the tests run is seen there, too: core, pytest, hypothesis.
    (here / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in seen))
    run(*pip, "--python", root / "bin" / "python", "install", *offline, wheel, cwd=project)
    return root / "bin" / "python"


def test_its_own_tests_pass_where_it_is_installed(project: Path, python: Path) -> None:
    """All of both contracts, with every fixture that the example has a use for."""
    printed = run(python, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-q", "tests", cwd=project)

    summary = re.search(r"(\d+) passed, (\d+) skipped in", printed)
    assert summary is not None, printed
    assert int(summary[1]) > 40, printed
    assert int(summary[2]) <= 18, printed


def test_what_the_text_offers_beyond_keeps_to_the_contract(project: Path, python: Path) -> None:
    """Patience, digests, diagnosis, runs and batches as the text shows them."""
    section = _TEXT.read_text().partition("## 5. Offer more")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (project / "more").mkdir()
    (project / "more" / "test_more.py").write_text("\n\n".join(["from __future__ import annotations", *blocks, _MORE]))
    (project / "more" / "conftest.py").write_text("import sys\nsys.path.insert(0, 'tests')\n")

    printed = run(python, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rs", "more", cwd=project)

    assert 5 == len(blocks)
    passed = set(re.findall(r"::(test_\w+)\S* PASSED", printed))
    optional = ("batch", "capabilities", "credentials_say", "digests", "endpoint", "patience", "runs")
    rules = {name for name in dir(StorageContract) if name.startswith("test_") and any(map(name.count, optional))}
    assert len(rules) >= len(optional)
    assert set() == {"test_capabilities", *rules} - passed, printed


def test_a_checkpoint_loads_through_its_scheme(project: Path, python: Path, tmp_path: Path) -> None:
    """Found by its scheme alone, it brings every byte of a checkpoint of two shards."""
    shards = [{"a": tensor("F32", [3, 5], 1), "b": tensor("BF16", [64, 32], 2)}, {"c": tensor("I64", [7], 3)}]
    with web_server(project) as server:
        for number, tensors in enumerate(shards, 1):
            server.put(f"some model/model-0000{number}-of-00002.safetensors", safetensors_file(tensors))

        printed = run(python, "-c", _LOAD, f"hello://{server.authority}/some%20model", cwd=tmp_path)

    expected = {name: content.hex() for tensors in shards for name, (_, _, content) in tensors.items()}
    assert expected == json.loads(printed)


def web_server(project: Path) -> Any:
    """The server of the example's own tests."""
    spec = importlib.util.spec_from_file_location("web_server", project / "tests" / "web_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WebServer()


def code_lines(path: Path) -> int:
    """Lines with code on them: neither imports, nor docstrings, comments and blank lines."""
    source = path.read_text()
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        for line in range(token.start[0], token.end[0] + 1)
        if token.string.strip()
    }
    for node in ast.walk(ast.parse(source)):
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if words or isinstance(node, (ast.Import, ast.ImportFrom)):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_it_is_about_as_small_as_is_said() -> None:
    """An author reads it in one sitting: some sixty lines of code, without imports and docstrings."""
    lines = {path.name: code_lines(path) for path in (_EXAMPLE / "src" / "mx_hello").glob("*.py")}

    assert sum(lines.values()) <= 66, lines


def test_it_depends_on_core_alone() -> None:
    """What an author copies brings nothing along."""
    text = (_EXAMPLE / "pyproject.toml").read_text()

    assert 'dependencies = ["modelexpress-core"]' in text


# -- docs/write-a-plugin.md --------------------------------------------------------------------------------------------

#: ``[path](link):`` before a block quotes a piece of a file.
_QUOTED = re.compile(
    r"^\[`(?P<name>[^`]+)`\]\((?P<link>[^)]+)\):\n\n```\w+\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)

_QUOTED_FILES = {"pyproject.toml", "src/mx_hello/plugin.py", "src/mx_hello/_storage.py", "tests/test_contract.py"}


def quotations() -> list[tuple[str, Path, str]]:
    """Each piece of the example in the text: the file's name, the target of its link, and the code."""
    return [(m["name"], (_TEXT.parent / m["link"]).resolve(), m["code"]) for m in _QUOTED.finditer(_TEXT.read_text())]


def test_the_text_quotes_packaging_code_and_tests() -> None:
    """In pieces, the longest of which fits on a screen."""
    names, _, pieces = zip(*quotations(), strict=True)

    assert set(names) == _QUOTED_FILES
    assert len(pieces) > len(_QUOTED_FILES)
    assert max(len(piece.splitlines()) for piece in pieces) <= 30


def test_the_text_quotes_the_files_as_they_are() -> None:
    """Each piece is a run of whole lines of the file that its link leads to; methods are shown without indentation."""
    for name, path, piece in quotations():
        text = f"\n{path.read_text()}"
        assert _EXAMPLE / name == path
        assert f"\n{piece}" in text or f"\n{textwrap.indent(piece, '    ')}" in text, f"{name} lacks:\n{piece}"


@pytest.mark.parametrize("name", sorted(_QUOTED_FILES - {"pyproject.toml"}))
def test_the_text_quotes_all_code(name: str) -> None:
    """The pieces have every line of the file that is not above its first class or function."""
    source = (_EXAMPLE / name).read_text()
    lines = [line.strip() for line in source.splitlines()]
    functions = (ast.ClassDef, ast.FunctionDef)
    first = next(node for node in ast.parse(source).body if isinstance(node, functions))
    begin = min(first.lineno, *(node.lineno for node in first.decorator_list)) if first.decorator_list else first.lineno
    shown = {line for quoted, _, piece in quotations() if quoted == name for line in map(str.strip, piece.splitlines())}

    assert [] == [line for line in lines[begin - 1 :] if line not in shown]


def test_links_of_the_text_lead_somewhere() -> None:
    """Every relative link names a file of the repository."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", _TEXT.read_text())

    assert links
    assert [] == [link for link in links if not (_TEXT.parent / link).exists()]


def test_the_text_names_what_the_kit_has() -> None:
    """Every fixture and attribute in the table of section 4 exists, and every one that exists is in it."""
    section = _TEXT.read_text().partition("## 4. Test it")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    own = {name for name in vars(StorageContract) if not name.startswith(("_", "test_"))}

    assert sorted(own) == sorted(rows)


def test_the_example_with_faults_runs() -> None:
    """The first block of the section on faults runs as it stands."""
    section = _TEXT.read_text().partition("## Try it with faults")[2]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match is not None

    names: dict[str, Any] = {}
    exec(compile(match[1], "write-a-plugin.md", "exec"), names)  # the claim is that it runs
    assert names["storage"].injected
