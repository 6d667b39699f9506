"""``mx_vllm.register``, which vLLM calls in each of its processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def _python(program: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=300, check=False
    )


def test_importing_imports_nothing_heavy() -> None:
    """Importing ``mx_vllm`` imports neither torch nor vLLM."""
    done = _python("import sys, mx_vllm; print(sorted({'torch', 'vllm', 'boto3'} & sys.modules.keys()))")

    assert done.stdout == "[]\n", done.stderr


def test_repeated_registration_replaces_all_formats() -> None:
    """All formats use our loader, without a warning about the replaced one."""
    done = _python(
        "import mx_vllm; mx_vllm.register(); mx_vllm.register()\n"
        "from vllm.config.load import LoadConfig\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "print([type(get_model_loader(LoadConfig(load_format=f))).__module__ for f in mx_vllm.LOAD_FORMATS])"
    )

    assert done.stdout.splitlines()[-1] == str(["mx_vllm._loader"] * 4), done.stderr
    assert "will be overwritten" not in done.stdout + done.stderr


@pytest.mark.parametrize("version", ["0.30.1", "0.34.0", "1.0"])
def test_an_unsupported_version_is_refused_and_vllm_continues(version: str) -> None:
    """The message names both versions; no error is raised."""
    done = _python(
        f"import importlib.metadata\nimportlib.metadata.version = lambda name: {version!r}\n"
        "import mx_vllm; mx_vllm.register(); print('continues')"
    )

    assert done.returncode == 0
    assert done.stdout == "continues\n"
    assert f"vLLM {version} is not supported: mx-vllm supports 0.31 to 0.33" in done.stderr


def test_options_of_other_formats_are_refused() -> None:
    """``model_loader_extra_config`` has no meaning for our formats."""
    done = _python(
        "import mx_vllm; mx_vllm.register()\n"
        "from vllm.config.load import LoadConfig\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "get_model_loader(LoadConfig(load_format='mx', model_loader_extra_config={'concurrency': 4}))"
    )

    assert done.returncode == 1
    assert "takes no model_loader_extra_config" in done.stderr


def test_an_address_that_the_load_format_does_not_read_is_told() -> None:
    """Before vLLM looks for its model."""
    done = _python(
        "import mx_vllm, os; mx_vllm.register(); os.environ['MX_MODEL_URI'] = 's3://bucket/model'\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "EngineArgs(model='/nothing').create_engine_config()"
    )

    assert done.returncode == 1
    assert "MX_MODEL_URI is set, but the load format 'auto' does not read it" in done.stderr + done.stdout


def test_nothing_happens_in_a_process_that_is_no_worker() -> None:
    """A frontend or planner gets MODEL_EXPRESS_URL too: no thread starts, nothing connects, and torch stays out."""
    done = _python(
        "import os, socket, sys, threading\n"
        "os.environ['MODEL_EXPRESS_URL'] = 'http://127.0.0.1:9'\n"
        "os.environ['MODEL_EXPRESS_NO_SHARED_STORAGE'] = '1'\n"
        "def refuse(*_): raise AssertionError('connects')\n"
        "socket.socket.connect = refuse\n"
        "import mx_vllm, mx_vllm.plugin\n"
        "from modelexpress_core import PluginManager\n"
        "PluginManager.discover()\n"
        "assert not {'torch', 'vllm', 'grpc'} & sys.modules.keys()\n"
        "import vllm.model_executor.model_loader\n"  # starts threads of its own
        "before = threading.active_count()\n"
        "mx_vllm.register()\n"
        "print(threading.active_count() - before, 'new threads')"
    )

    assert done.returncode == 0, done.stderr
    assert "0 new threads" == done.stdout.splitlines()[-1]


def test_a_name_that_neither_the_server_nor_the_hub_has() -> None:
    """With our formats the error is of the server; with others vLLM's own stays, also while it is offline."""
    done = _python(
        "import os, mx_vllm\n"
        "os.environ.update(MODEL_EXPRESS_URL='http://127.0.0.1:9', MODEL_EXPRESS_NO_SHARED_STORAGE='1',\n"
        "                  HF_HUB_OFFLINE='1', HF_HOME='/nonexistent')\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "for load_format in ('auto', 'mx'):\n"
        "    try:\n"
        "        EngineArgs(model='org/tiny', load_format=load_format).create_engine_config()\n"
        "    except Exception as exc:\n"
        "        print('RAISED', type(exc).__name__, str(exc).splitlines()[0])"
    )

    own, ours = [line for line in done.stdout.splitlines() if line.startswith("RAISED")]
    assert "RAISED LocalEntryNotFoundError" in own, done.stderr
    assert "RAISED ModelExpressError configuration and tokenizer of org/tiny do not come from the server" in ours
    assert "127.0.0.1:9" in ours


def test_a_command_line_of_a_program_around_vllm_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's worker hands its other options to this parser; version 1.6 was tried with ``--load-format mx``."""
    monkeypatch.setenv("VLLM_PLUGINS", "modelexpress")
    done = _python(
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "from vllm.plugins import load_general_plugins\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False), async_args_only=False)\n"
        "known, others = parser.parse_known_args(['--model', 'org/model', '--load-format', 'mx', '--is-worker'])\n"
        "load_general_plugins()\n"
        "config = AsyncEngineArgs.from_cli_args(known).create_load_config()\n"
        "print(others, type(get_model_loader(config)).__module__)"
    )

    assert done.stdout.splitlines()[-1] == "['--is-worker'] mx_vllm._loader", done.stderr
