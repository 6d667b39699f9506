"""What vLLM calls in each of its processes."""

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


def test_importing_costs_nothing() -> None:
    """Neither torch nor vLLM is imported before vLLM asks for the loader."""
    done = _python("import sys, mx_vllm; print(sorted({'torch', 'vllm', 'boto3'} & sys.modules.keys()))")

    assert done.stdout == "[]\n", done.stderr


def test_both_names_are_ours_however_often_it_is_called() -> None:
    """Without a word of warning about the name that was taken over."""
    done = _python(
        "import mx_vllm; mx_vllm.register(); mx_vllm.register()\n"
        "from vllm.config.load import LoadConfig\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "print([type(get_model_loader(LoadConfig(load_format=f))).__module__ for f in ('mx', 'modelexpress')])"
    )

    assert done.stdout.splitlines()[-1] == "['mx_vllm._loader', 'mx_vllm._loader']", done.stderr
    assert "will be overwritten" not in done.stdout + done.stderr


@pytest.mark.parametrize("version", ["0.30.1", "0.34.0", "1.0"])
def test_a_version_that_is_not_known_is_refused_and_vllm_goes_on(version: str) -> None:
    """The message names both versions; nothing is raised."""
    done = _python(
        f"import importlib.metadata\nimportlib.metadata.version = lambda name: {version!r}\n"
        "import mx_vllm; mx_vllm.register(); print('goes on')"
    )

    assert done.returncode == 0
    assert done.stdout == "goes on\n"
    assert f"vLLM {version} is not supported: mx-vllm knows 0.31 to 0.33" in done.stderr


def test_options_that_mean_nothing_here_are_refused() -> None:
    """They are vLLM's, for other formats."""
    done = _python(
        "import mx_vllm; mx_vllm.register()\n"
        "from vllm.config.load import LoadConfig\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "get_model_loader(LoadConfig(load_format='mx', model_loader_extra_config={'concurrency': 4}))"
    )

    assert done.returncode == 1
    assert "takes no model_loader_extra_config" in done.stderr
