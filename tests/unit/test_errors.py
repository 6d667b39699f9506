"""The tree of errors, how their messages are laid out, and that they survive a process boundary."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest

from modelexpress_core import errors
from modelexpress_core.errors import BackendError, IncompleteLoadError, ModelExpressError, PluginLoadError

_CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]

#: Arguments beside the message, by the class that takes them.
_ARGUMENTS: dict[type, dict[str, Any]] = {
    errors.PluginError: {"plugin": "mx-x"},
    errors.CheckpointError: {"uri": "file:///m", "file": "a.safetensors"},
    errors.PlacementError: {"tensor": "lm_head.weight"},
    errors.IncompleteLoadError: {"missing": ["a", "b"], "unexpected": ["c"]},
    errors.BackendError: {
        "uri": "s3://b/m",
        "operation": "read bytes 0-9",
        "provider": "mx-s3",
        "retryable": True,
        "peer_at_fault": True,
        "retry_after_seconds": 1.5,
    },
}


def made(cls: type[ModelExpressError]) -> ModelExpressError:
    """An error of the class with every attribute set to something that is no default."""
    arguments = {
        key: value for base, more in _ARGUMENTS.items() if issubclass(cls, base) for key, value in more.items()
    }
    error = cls("what happened", cause="a cause", hint="do this", **arguments)
    if isinstance(error, BackendError):
        error.attempts = 3
    return error


def drawn() -> dict[str, str | None]:
    """Class -> its parent, as the tree in the module's docstring has it."""
    parents: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([\s│├└─]*)([A-Z]\w+Error)\b", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[name] = stack[-1][1] if stack else None
        stack.append((depth, name))
    return parents


def test_the_tree_that_is_drawn_is_the_tree() -> None:
    """Every class stands in the drawing under its base, and nothing else does."""
    actual = {
        cls.__name__: None if cls is ModelExpressError else next(base.__name__ for base in cls.__bases__)
        for cls in _CLASSES
    }

    assert drawn() == actual


def test_all_is_sorted_and_complete() -> None:
    """``__all__`` names every error, in order."""
    assert sorted(cls.__name__ for cls in _CLASSES) == errors.__all__


@pytest.mark.parametrize("cls", _CLASSES)
def test_everything_raised_on_purpose_has_one_base(cls: type) -> None:
    """``except ModelExpressError`` catches them all, and each says what it means."""
    assert issubclass(cls, ModelExpressError)
    assert cls.__doc__


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_has_one_line_for_each_part() -> None:
    """What happened, the likely cause, the next step."""
    error = ModelExpressError("it broke", cause="age", hint="buy another")

    assert "it broke\nLikely cause: age.\nNext step: buy another." == str(error)


def test_parts_that_are_not_known_are_left_out() -> None:
    """No empty lines, no headings with nothing below."""
    assert "it broke" == str(ModelExpressError("it broke"))
    assert "it broke\nNext step: mend it." == str(ModelExpressError("it broke", hint="mend it"))


def test_a_command_at_the_end_gets_no_full_stop() -> None:
    """It would be copied into the name of a path."""
    error = ModelExpressError("it broke", hint="write s3:// instead; for that, pip install -e /a/plugins/mx-s3")

    assert str(error).endswith("pip install -e /a/plugins/mx-s3")


@pytest.mark.parametrize(("hint", "line"), [("mend it.", "mend it."), ("mend it?", "mend it?"), ("go!", "go!")])
def test_a_part_that_ends_a_sentence_gets_no_second_full_stop(hint: str, line: str) -> None:
    """Hints are sometimes questions: "have you forgotten the comma?"."""
    error = ModelExpressError("it broke", cause=hint, hint=hint)

    assert f"it broke\nLikely cause: {line}\nNext step: {line}" == str(error)


@pytest.mark.parametrize(
    ("arguments", "attempts", "expected"),
    [
        ({}, 1, "timed out"),
        ({"uri": "s3://b/m"}, 1, "s3://b/m: timed out"),
        ({"operation": "list the files"}, 1, "could not list the files: timed out"),
        ({"uri": "s3://b/m", "operation": "read"}, 1, "could not read of s3://b/m: timed out"),
        ({"uri": "s3://b/m", "operation": "read"}, 3, "could not read of s3://b/m after 3 attempts: timed out"),
    ],
)
def test_a_backend_error_says_what_was_tried(arguments: dict[str, str], attempts: int, expected: str) -> None:
    """Operation, URI and attempts come before what came back, as far as they are known."""
    error = BackendError("timed out", **arguments)  # type: ignore[arg-type]  # only strings in these cases
    error.attempts = attempts

    assert expected == str(error)


def test_a_backend_error_gives_cause_and_hint_below() -> None:
    """The same layout as any error's."""
    error = BackendError("403", uri="s3://b/m", operation="read", cause="an old key", hint="renew it")

    assert "could not read of s3://b/m: 403\nLikely cause: an old key.\nNext step: renew it." == str(error)


def test_a_reason_of_several_lines_is_not_repeated() -> None:
    """Services answer with more than one line; each appears once."""
    error = BackendError("first\nsecond", uri="s3://b/m", hint="wait")

    assert "s3://b/m: first\nsecond\nNext step: wait." == str(error)


@pytest.mark.parametrize("cls", [cls for cls in _CLASSES if issubclass(cls, BackendError)])
def test_what_a_class_says_of_retrying_can_be_overruled(cls: type[BackendError]) -> None:
    """Overload, lost connections and deadlines are worth a retry by default; nothing else is."""
    by_default = issubclass(cls, (errors.UnavailableError, errors.DeadlineError))

    assert by_default is cls("x").retryable
    assert True is cls("x", retryable=True).retryable
    assert False is cls("x", retryable=False).retryable


def test_names_of_tensors_are_kept_as_tuples() -> None:
    """So that an error cannot be changed after it was raised."""
    error = IncompleteLoadError("half a model", missing=["a"], unexpected=iter(["b"]))  # type: ignore[arg-type]

    assert (("a",), ("b",)) == (error.missing, error.unexpected)


# -- crossing processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pickle", "copy", "deepcopy"])
@pytest.mark.parametrize("cls", _CLASSES)
def test_an_error_survives_pickling_and_copying(cls: type[ModelExpressError], how: str) -> None:
    """Engines run workers in processes of their own and hand errors over: nothing of them may get lost."""
    error = made(cls)
    ways = {"pickle": lambda e: pickle.loads(pickle.dumps(e)), "copy": copy.copy, "deepcopy": copy.deepcopy}

    again = ways[how](error)

    assert type(error) is type(again)
    assert str(error) == str(again)
    assert error.args == again.args
    assert vars(error) == vars(again)


class OddlyMadeError(BackendError):
    """A backend's own error, with a constructor of its own."""

    def __init__(self, code: int, *, bucket: str) -> None:
        super().__init__(f"code {code} from {bucket}")
        self.code = code


def test_an_error_with_a_constructor_of_its_own_survives_too() -> None:
    """Plugins derive from our errors; pickling must not depend on their arguments."""
    error = OddlyMadeError(7, bucket="b")
    error.add_note("seen twice") if hasattr(error, "add_note") else None

    again = pickle.loads(pickle.dumps(error))

    assert str(error) == str(again)
    assert vars(error) == vars(again)


def test_an_error_crosses_a_real_process_boundary() -> None:
    """Pickled in another process, it has its class, message and attributes here."""
    code = (
        "import pickle, sys; from modelexpress_core.errors import PluginLoadError\n"
        "error = PluginLoadError('broken over there', plugin='mx-x', hint='mend it')\n"
        "sys.stdout.buffer.write(pickle.dumps(error))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    assert 0 == done.returncode, done.stderr.decode()
    with pytest.raises(PluginLoadError) as caught:
        raise pickle.loads(done.stdout)
    assert ("mx-x", "mend it") == (caught.value.plugin, caught.value.hint)
    assert "broken over there\nNext step: mend it." == str(caught.value)
