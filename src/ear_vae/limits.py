"""What numbers and names from a file or a caller may be, checked before any work is spent on them."""

from __future__ import annotations

import json
import math
import operator
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ear_vae.errors import EarVAEError

LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE = 1_000, 768_000
"""Range of sample rates in Hz, wide enough for telephones and the fastest converters."""
HIGHEST_DOWNSAMPLING_RATIO = 2**16
"""Samples per latent frame."""
_MOST_JSON_BYTES = 2**20
_NAMES_SHOWN = 5
_LONGEST_NAME = 100
_MOST_BITS = 64


def sample_rate_of(value: Any, what: str = "sample_rate") -> int:
    """Returns a sample rate in Hz as a Python integer; integers of numpy and torch are accepted too.

    Args:
        value: Value to check.
        what: Name of the value in messages.

    Raises:
        EarVAEError: It is no integer, or out of range.
    """
    rate = integer(value)
    if rate is None:
        raise EarVAEError(f"{what} must be an integer, got {shown(value)}")
    if not LOWEST_SAMPLE_RATE <= rate <= HIGHEST_SAMPLE_RATE:
        raise EarVAEError(
            f"{what} must be {LOWEST_SAMPLE_RATE} to {HIGHEST_SAMPLE_RATE} Hz, got {shown(rate)}"
        )
    return rate


def integer(value: Any) -> int | None:
    """Returns `value` as a Python integer if it is an integer of any library and no boolean, else None."""
    if isinstance(value, bool) or (getattr(value, "dtype", None) is not None and "bool" in str(value.dtype)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole_number(value: Any, what: str, *, lowest: int) -> int:
    """An argument that counts something, as a Python integer; those of numpy and torch are taken too.

    Args:
        value: What was given.
        what: What messages call it.
        lowest: Smallest number that is taken.

    Raises:
        EarVAEError: It is no integer, or too small.
    """
    number = integer(value)
    if number is None or number < lowest:
        raise EarVAEError(f"{what} must be an integer of {lowest} or more, got {shown(value)}")
    return number


def finite_number(value: Any) -> bool:
    """Whether it is a number that is neither NaN nor infinite; truth values are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> str:
    """Returns the `repr` of a value for a message, cut to what fits in a line."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"an integer of {value.bit_length()} bits"
    return _short.repr(value)


def escaped(text: str) -> str:
    r"""Returns the text with control characters, and bytes that are no UTF-8, as escapes such as `\x1b`."""
    return "".join(map(_escaped_character, text))


def shortened(text: str, longest: int) -> str:
    """Returns the text without its middle where it is longer than that many characters."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def name_in_a_line(name: str, longest: int = _LONGEST_NAME) -> str:
    """Returns a name from anywhere escaped and shortened, to fit in a line of text."""
    return shortened(escaped(name), longest)


def counted(count: int, noun: str) -> str:
    """Returns a number with its noun in the singular or plural: `1 file`, `2 files`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def first_names(names: Sequence[str]) -> str:
    """Returns the first names, escaped, and the number of the others: thousands would fill a terminal."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(map(escaped, names[:_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


def parse_json(text: str | bytes) -> Any:
    """Parses JSON from anywhere.

    Raises:
        ValueError: The text is not JSON, or nested too deeply or with numbers too long for Python's parser.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # Python's own text advises to lift the limit
        raise ValueError("it holds a number of thousands of digits") from None


def read_json(path: Path) -> Any:
    """Reads a small JSON file.

    Raises:
        EarVAEError: The file cannot be read, is larger than 1 MiB, or is not JSON.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_JSON_BYTES + 1)
        if len(content) > _MOST_JSON_BYTES:
            raise ValueError(f"it is larger than {_MOST_JSON_BYTES} bytes")
        return parse_json(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise EarVAEError(f"{path}: cannot read the config: {error}") from error


def _escaped_character(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class _Short(reprlib.Repr):
    """`reprlib.repr`, which cuts long and deep values, with a little more room."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlist = self.maxtuple = self.maxdict = 12
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return shown(x) if x.bit_length() > _MOST_BITS else repr(x)


_short = _Short()


def pack_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Packs facts into one entry of a safetensors file's metadata: several are written in random order."""
    return {_KEY: json.dumps(facts, sort_keys=True)}


def unpack_facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Unpacks what `pack_facts` packed; returns nothing for a file of another program.

    Raises:
        ValueError: The entry is there and damaged.
    """
    packed = (metadata or {}).get(_KEY)
    if packed is None:
        return {}
    facts = parse_json(packed)
    if not isinstance(facts, dict):
        raise ValueError(f"expected an object, got {shown(facts)}")
    return facts


_KEY = "ear_vae"
