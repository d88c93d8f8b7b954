"""The error class, and what errors of any kind say in a line."""

from __future__ import annotations

import errno
import pickle

import pytest
import soundfile

from ear_vae.errors import EarVAEError, first_line, in_one_line


@pytest.mark.parametrize(
    ("value", "called", "typed"),
    [
        (True, "x: exists (overwrite=True)", "x: exists (--force)"),
        (..., "x: exists (overwrite=...)", "x: exists (--force)"),
        ("a b", "x: exists (overwrite='a b')", "x: exists (--force 'a b')"),
    ],
)
def test_an_error_names_the_argument_to_callers_and_the_option_to_commands(
    value: object, called: str, typed: str
) -> None:
    error = EarVAEError("x: exists", argument="overwrite", value=value)
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert str(same) == in_one_line(same) == called
        assert in_one_line(same, {"overwrite": "--force"}) == typed
        assert in_one_line(same, {}) == "x: exists"
    assert in_one_line(EarVAEError("y"), {"overwrite": "--force"}) == str(EarVAEError("y")) == "y"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.wav"), "a.wav: No space left on device"),
        (OSError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (MemoryError(), "not enough memory; cut the audio into parts, or choose another device"),
        (
            RuntimeError("CUDA out of memory.\nTried"),
            "not enough memory; cut the audio into parts, or choose",
        ),
        (ValueError("\n  first \n second"), "ValueError: first"),
        (KeyError(), "KeyError: KeyError"),
        (soundfile.LibsndfileError(1, "Error opening 'a': "), "LibsndfileError: Format not recognised."),
    ],
)
def test_errors_of_others_in_a_line(error: Exception, line: str) -> None:
    assert in_one_line(error).startswith(line)
    assert "\n" not in in_one_line(error)


def test_the_first_line_of_a_message_without_words_is_its_class() -> None:
    assert first_line(ValueError(" \n")) == "ValueError"
    assert first_line(ValueError("\n a \n\n b\nc"), most=2) == "a b"
