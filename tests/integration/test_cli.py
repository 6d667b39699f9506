"""The ``mx`` command, run as a person or a script would."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

import modelexpress_core as core
from modelexpress_core.cli.load import _LoadObserver
from modelexpress_core.events import LoadProgress, LoadStarted

Run = Callable[..., "subprocess.CompletedProcess[str]"]

REPORT_KEYS = {
    "uri",
    "tensors",
    "files",
    "bytes_needed",
    "bytes_fetched",
    "bytes_materialised",
    "seconds",
    "goodput_bytes_per_second",
    "requests",
    "retries",
    "concurrency",
    "verified",
    "peak_rss_bytes",
    "storage",
}


def test_load_reports_as_json(mx: Run, uploaded: str, environ: dict[str, str]) -> None:
    """stdout is one JSON object with every promised key and true figures; stderr is empty."""
    done = mx("load", uploaded, "--json", environ=environ)

    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert report.keys() >= REPORT_KEYS
    assert report["uri"] == uploaded
    assert report["bytes_needed"] == report["bytes_fetched"]
    assert (report["files"], report["tensors"]) == (3, 17)
    assert report["verified"] == {"versions": 3, "sizes": 3, "digests": 3}
    assert report["storage"]["plugin"] == "mx-s3"
    assert report["peak_rss_bytes"] > report["bytes_needed"]
    assert report["goodput_bytes_per_second"] == pytest.approx(report["bytes_needed"] / report["seconds"])


def test_digests_are_those_of_the_tensors_bytes(
    mx: Run, uploaded: str, sharded: Path, environ: dict[str, str], tmp_path: Path, expected: Any
) -> None:
    """The file maps every name to the SHA-256 of what safetensors reads, and nothing else lies beside it."""
    import torch

    out = tmp_path / "out"
    out.mkdir()
    done = mx("load", uploaded, "--digests", str(out / "digests.json"), environ=environ)

    assert done.returncode == 0, done.stderr
    reference = {
        name: hashlib.sha256(bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())).hexdigest()
        for name, tensor in expected(sharded).items()
    }
    assert json.loads((out / "digests.json").read_text()) == reference
    assert [path.name for path in out.iterdir()] == ["digests.json"]


def test_load_prints_a_report_for_people(mx: Run, sharded: Path) -> None:
    """A plain path loads, and the main figures are named."""
    done = mx("load", str(sharded))

    assert done.returncode == 0, done.stderr
    for word in ("17 in 3 files", "needed", "fetched", "modelexpress-core", "peak RSS"):
        assert word in done.stdout


def test_a_terminal_sees_a_progress_bar(sharded: Path, on_terminal: Callable[..., tuple[int, bytes]]) -> None:
    """On a terminal a bar with bytes and rate is drawn; the report follows."""
    code, seen = on_terminal("load", str(sharded))

    assert code == 0
    assert b"17 tensors" in seen
    assert "━".encode() in seen
    assert b"needed" in seen


def test_the_bar_says_what_limits_the_load() -> None:
    """As soon as that is known."""
    bar = Progress()
    watch = _LoadObserver(bar)
    watch.mx_load_started(LoadStarted("1", "file:///m", "file", files=1, tensors=17, checkpoint_bytes=100))

    def shown(limiter: str) -> str:
        watch.mx_load_progress(LoadProgress("1", "file:///m", 10, 100, True, 1.0, 10.0, 9.0, 0, limiter))
        return bar.tasks[0].description

    assert shown("") == "17 tensors"
    assert shown("network") == "17 tensors (limit: network)"


def test_inspect_lists_tensors_files_and_versions(mx: Run, uploaded: str, environ: dict[str, str]) -> None:
    """As JSON and as text: what the headers say."""
    as_json = mx("inspect", uploaded, "--json", environ=environ)
    as_text = mx("inspect", uploaded, environ=environ)

    content = json.loads(as_json.stdout)
    checkpoint = core.open_checkpoint(uploaded, environ=environ)
    assert [tensor["name"] for tensor in content["tensors"]] == list(checkpoint.tensors)
    assert content["bytes"] == checkpoint.tensor_bytes
    assert [file["version"] for file in content["files"]] == [file.version for file in checkpoint.files]
    assert as_text.returncode == 0, as_text.stderr
    for tensor in content["tensors"]:
        assert tensor["name"] in as_text.stdout
    assert "BF16" in as_text.stdout
    assert "F8_E4M3" in as_text.stdout


def test_inspect_does_not_need_torch(sharded: Path) -> None:
    """Headers are read without importing torch."""
    program = (
        "import sys; sys.argv = ['mx', 'inspect', sys.argv[1], '--json']\n"
        "from modelexpress_core.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "assert 'torch' not in sys.modules"
    )

    done = subprocess.run([sys.executable, "-c", program, str(sharded)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_plugins_lists_the_installed_ones(mx: Run) -> None:
    """Core and mx-s3, with versions and schemes."""
    done = mx("plugins", "--json")

    listed = {plugin["distribution"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    assert listed["modelexpress-core"]["schemes"] == {
        "storage": ["file", "memory"],
        "transport": ["inproc"],
        "discovery": ["k8s-service", "server", "static"],
        "metadata store": ["memory", "redis", "rediss"],
        "authenticator": ["token", "mtls"],
        "server service": [
            "model_express.health.HealthService",
            "model_express.api.ApiService",
            "model_express.p2p.P2pService",
            "modelexpress.access.AccessService",
            "model_express.model.ModelService",
            "modelexpress.cache.CacheService",
        ],
        "command": ["serve", "health", "sources", "models"],
    }
    assert listed["mx-s3"]["schemes"] == {"storage": ["s3"]}
    assert listed["mx-s3"]["status"] == "loaded"
    assert listed["mx-s3"]["version"] == listed["modelexpress-core"]["version"]
    assert "mx-s3" in mx("plugins").stdout


def test_plugins_shows_a_disabled_one_with_its_reason(mx: Run) -> None:
    """The reason names the variable."""
    done = mx("plugins", environ={"MX_DISABLED_PLUGINS": "mx-s3"})

    assert done.returncode == 0, done.stderr
    assert "disabled" in done.stdout
    assert "MX_DISABLED_PLUGINS" in done.stdout


def test_settings_shows_values_and_where_they_came_from(mx: Run) -> None:
    """An alias is named as the source, a secret is hidden, a default says so."""
    environ = {"RUNAI_STREAMER_CONCURRENCY": "5", "AWS_SECRET_ACCESS_KEY": "very-private"}

    as_json = mx("settings", "--json", environ=environ)
    as_text = mx("settings", environ=environ)

    rows = {row["name"]: row for row in json.loads(as_json.stdout)}
    assert (rows["MX_CONCURRENCY"]["value"], rows["MX_CONCURRENCY"]["source"]) == ("5", "RUNAI_STREAMER_CONCURRENCY")
    assert rows["MX_CHUNK_BYTES"]["source"] == "default"
    assert rows["AWS_SECRET_ACCESS_KEY"]["value"] == "***"
    assert "MX_CONCURRENCY" in as_text.stdout
    assert "very-private" not in as_json.stdout + as_json.stderr + as_text.stdout + as_text.stderr


def test_an_unknown_variable_earns_a_warning(mx: Run, sharded: Path) -> None:
    """A misspelt variable is named with the nearest one that exists; on stderr, so that JSON stays JSON."""
    done = mx("load", str(sharded), "--json", environ={"MX_CONCURENCY": "4"})

    assert done.returncode == 0
    assert "MX_CONCURRENCY?" in done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "Usage"),
        (("load",), 2, "Missing argument"),
        (("nosuch",), 2, "No such command"),
        (("load", "x", "--nosuch"), 2, "No such option"),
        (("load", "s3:/bucket/model"), 2, "s3://bucket/model"),
        (("load", ""), 2, "empty"),
        (("load", "/no/such/model"), 1, "/no/such/model"),
        (("inspect", "/no/such/model"), 1, "/no/such/model"),
        (("load", "hf://model"), 2, "write hf://org/name"),
        (("load", "nosuch://bucket/model"), 1, "file, gs, hf, memory"),
        (("load", "MODEL", "--device", "meta"), 1, "no memory"),
        (("load", "MODEL", "--device", "abacus"), 1, "abacus"),
        (("load", "MODEL", "--digests", "/no/such/directory/x"), 1, "/no/such/directory/x"),
        (("--log-level", "loud", "plugins"), 2, "loud"),
    ],
)
def test_wrong_input_gives_a_message_and_its_exit_code(
    arguments: tuple[str, ...], code: int, words: str, mx: Run, sharded: Path
) -> None:
    """1 for what failed, 2 for wrong usage; a message on stderr that says what to do; no traceback."""
    done = mx(*(str(sharded) if argument == "MODEL" else argument for argument in arguments))

    assert done.returncode == code, done.stdout + done.stderr
    assert words in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


def test_a_failure_is_json_where_json_was_asked_for(mx: Run) -> None:
    """Scripts read the error from stdout as they read a report."""
    done = mx("load", "/no/such/model", "--json")

    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1
    assert error["type"] == "NotFoundError"
    assert "/no/such/model" in error["message"]
    assert error["hint"]


def test_bad_settings_are_all_named(mx: Run, sharded: Path) -> None:
    """Every variable that cannot be used, at once."""
    done = mx("load", str(sharded), environ={"MX_CONCURRENCY": "many", "MX_CHUNK_BYTES": "-1"})

    assert done.returncode == 1
    assert "MX_CONCURRENCY" in done.stderr
    assert "MX_CHUNK_BYTES" in done.stderr


def test_help_and_version(mx: Run) -> None:
    """Help names every command and the exit codes; the version is the distribution's."""
    shown = mx("--help")
    version = mx("--version")

    for word in ("load", "inspect", "doctor", "pull", "plugins", "settings", "Exit codes"):
        assert word in shown.stdout
    assert version.stdout.startswith("mx 0.")


def test_completion_can_be_installed(mx: Run) -> None:
    """The completion script for a shell is there to be shown."""
    done = mx("--show-completion", "bash", environ={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})

    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout


def test_settings_shows_the_others_where_one_cannot_be_used(mx: Run) -> None:
    """The command that every message about settings points to works, marks the bad one, and fails."""
    done = mx("settings", environ={"MX_CONCURRENCY": "many", "MX_CHUNK_BYTES": "4MiB"})

    assert done.returncode == 1
    assert "MX_CONCURRENCY = *** (from MX_CONCURRENCY) cannot be used" in done.stdout
    assert "MX_CHUNK_BYTES = 4194304" in done.stdout
    assert "AWS_REGION" in done.stdout
    assert "expected a whole number" in done.stderr


def test_details_in_the_log_are_ours_alone(mx: Run, uploaded: str, environ: dict[str, str]) -> None:
    """What SDKs log in detail holds credentials, so that asking us for details does not ask them."""
    environ["AWS_SESSION_TOKEN"] = "very-private-token"

    done = mx("--log-level", "debug", "inspect", uploaded, "--json", environ={**environ, "MX_RETRY_ATTEMPTS": "1"})

    assert "very-private-token" not in done.stdout + done.stderr
    assert environ["AWS_ACCESS_KEY_ID"] not in done.stdout + done.stderr


def test_strict_plugins_do_not_keep_help_and_the_list_of_plugins_away(mx: Run, tmp_path: Path) -> None:
    """Whoever has to find out what is broken can."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelexpress.plugins]\nbroken = nowhere_to_be_found\n")
    environ = {"PYTHONPATH": str(tmp_path), "MX_STRICT_PLUGINS": "1"}

    listed = mx("plugins", "--json", environ=environ)
    version = mx("--version", environ=environ)
    loaded = mx("load", "x", environ=environ)

    states = {plugin["distribution"]: plugin["status"] for plugin in json.loads(listed.stdout)["plugins"]}
    assert states["broken"] == "broken"
    assert version.returncode == 0
    assert loaded.returncode == 1
    assert "nowhere_to_be_found" in loaded.stderr
    assert "Traceback" not in listed.stderr + version.stderr + loaded.stderr


def test_output_that_cannot_be_written_is_an_error(sharded: Path) -> None:
    """A full disk gives a message and exit code 1."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "modelexpress_core", "inspect", str(sharded), "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_log_level_of_mx_reaches_core_and_plugins(
    mx: Run, uploaded: str, environ: dict[str, str], tmp_path: Path
) -> None:
    """Loads say what they do in the log, and so do plugins; by default neither does."""
    (tmp_path / "chatting").mkdir()
    (tmp_path / "chatting" / "__init__.py").touch()
    (tmp_path / "chatting" / "plugin.py").write_text(
        "import logging\n"
        "from modelexpress_core.hooks import hookimpl\n"
        "@hookimpl\n"
        "def mx_load_started(event):\n"
        "    logging.getLogger('chatting.inner').debug('a detail of a plugin')\n"
        "    logging.getLogger('sdk').debug('a detail of an SDK')\n"
    )
    info = tmp_path / "chatting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: chatting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelexpress.plugins]\nchatting = chatting.plugin\n")
    environ = {**environ, "PYTHONPATH": str(tmp_path)}

    detailed = mx("--log-level", "debug", "load", uploaded, "--json", environ=environ)
    usual = mx("load", uploaded, "--json", environ=environ)

    assert 0 == detailed.returncode, detailed.stderr
    for line in (
        f"DEBUG candidates for {uploaded}",
        f"DEBUG reading the headers below {uploaded} with mx-s3",
        f"DEBUG opened {uploaded} with mx-s3",
        f"DEBUG loaded {uploaded}",
        "DEBUG a detail of a plugin",
    ):
        assert line in detailed.stderr
    assert "a detail of an SDK" not in detailed.stderr
    assert "" == usual.stderr
    json.loads(detailed.stdout)


@pytest.mark.slow
def test_digests_are_not_written_through_a_link(sharded: Path, tmp_path: Path) -> None:
    """Somebody who may write to the directory puts one in place of the file that is being written."""
    valuable, out = tmp_path / "valuable", tmp_path / "out"
    valuable.write_text("mine")
    valuable.chmod(0o600)
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "modelexpress_core", "load", str(sharded), "--digests", str(out / "digests.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    temporary: list[Path] = []
    while not temporary and process.poll() is None:  # the load takes far longer than this loop to see the file
        temporary = list(out.iterdir())
    (tmp_path / "link").symlink_to(valuable)
    (tmp_path / "link").rename(temporary[0])
    said, _ = process.communicate(timeout=120)

    assert ("mine", 0o600) == (valuable.read_text(), valuable.stat().st_mode & 0o777), said
