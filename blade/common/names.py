"""Names of files that are made from texts: readable, different for different texts, and allowed everywhere."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

STEM_BYTES = 80
"""Most bytes of a text in a file's name."""

TEXT_DIGITS = 6
"""Hexadecimal digits of a text's hash in a name that does not show the whole text."""

RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices, with any extension."""

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
"""Characters that a name cannot have on Windows, "/" and NUL nowhere."""


def file_name(text: str, *, limit: int = STEM_BYTES, fallback: str = "video") -> str:
    """Return a text as it can stand in a file's name: lower case, words joined by hyphens.

    Different texts have different names: one that does not show the whole text, as it was cut or has other characters
    or capitals, ends with digits of a hash.

    Args:
        text: any text.
        limit: most bytes of the words; the hash comes in addition.
        fallback: stands for a text without letters and digits.
    """
    words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", text.lower())).strip("-")
    words = cut_bytes(words, limit).rstrip("-") or fallback
    if words.replace("-", " ") == text and not RESERVED.fullmatch(words):
        return words
    return f"{words}-{short_hash(text, TEXT_DIGITS)}"


def literal_name(text: str, limit: int) -> str:
    """Return a text as the beginning of a file's name, with "_" for characters that a name cannot have."""
    name = cut_bytes(FORBIDDEN.sub("_", text), limit)
    # with anything behind it, "aux." is a device, and "aux" is none
    return name.replace(".", "_", 1) if RESERVED.fullmatch(name) else name


def cut_bytes(text: str, limit: int) -> str:
    """Return the beginning of a text that has at most so many bytes in UTF-8, of whole characters."""
    return text.encode(errors="replace")[:limit].decode(errors="ignore")


def short_hash(text: str, digits: int) -> str:
    """Return so many hexadecimal digits of a text's hash."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]


def is_portable(name: str) -> bool:
    """Return whether files and folders can have a name on every system, and have no other by it."""
    return not (RESERVED.fullmatch(name) or FORBIDDEN.search(name) or name.endswith((".", " ")))


def check_no_input(written: Iterable[Path], inputs: Mapping[Path, str], option: str = "output") -> None:
    """Check that nothing that will be written is one of the inputs, whatever links lead to it.

    Args:
        written: files or folders that will be written.
        inputs: the options that name the inputs, by path.
        option: the option that names what will be written.

    Raises:
        ValueError: naming both.
    """
    for path in written:
        for source, field in inputs.items():
            if is_same_file(path, source):
                raise ValueError(f"`{option}` must not replace an input, got {path}, which is `{field}` {source}.")


def is_same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, by links too."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False
