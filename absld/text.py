"""Texts from outside, such as class names and paths: one line, nothing hidden, of known width."""

import re
import unicodedata
from collections.abc import Sequence

SITE = "https://absld.github.io/absld"


def page_of(topic: str) -> str:
    """Return the address of a page of the documentation, which no package contains."""
    return f"{SITE}/{topic}/"


def printable(text: str) -> str:
    r"""Return a text in which all that is not shown as itself is escaped, such as \x1b or \u202e.

    Control characters, line breaks, changes of direction and bytes that are not UTF-8 cannot then
    act on a terminal, a page or a table, nor fail to be encoded.
    """
    return "".join(letter if is_shown(letter) else escaped(letter) for letter in text)


def is_shown(letter: str) -> bool:
    joiners = "\u200c\u200d"  # they shape letters in some scripts
    return letter.isprintable() or letter in joiners or unicodedata.category(letter) == "Zs"


def escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def columns(text: str) -> int:
    """Return the width of a text in Latin letters; those of some scripts are twice as wide."""
    marks = sum(unicodedata.combining(letter) > 0 for letter in text)
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) - marks + wide


def wrap(text: str, width: int, first: str = "", later: str = "") -> list[str]:
    """Wrap a text to lines of at most `width` columns, the first and later ones indented by texts.

    Breaks at spaces, and within a word only if it is longer than a line.
    """
    # Not textwrap, which counts letters: a letter of some scripts takes two columns, a mark none.
    lines: list[str] = []
    for space, word in re.findall("( *)([^ ]+)", printable(text)):
        if lines and columns(lines[-1] + space + word) <= width:
            lines[-1] += space + word
            continue
        lines.append(later if lines else first)
        for letter in word:
            if columns(lines[-1] + letter) > width:
                lines.append(later)
            lines[-1] += letter
    return lines


def clip(text: str, width: int) -> str:
    """Shorten a text to at most `width` columns in its middle: names often differ at their ends."""
    text = printable(text)
    if columns(text) <= width:
        return text
    head, tail = text[:width], text[-width:]
    while columns(head) + columns(tail) >= width:
        head, tail = (head[:-1], tail) if len(head) > 2 * len(tail) else (head, tail[1:])
    return f"{head}…{tail}"


def first_of(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join names; of more than `most`, the first ones, and dots."""
    return separator.join([*names[:most], *(["..."] if len(names) > most else [])])


def column(text: str, width: int) -> str:
    """Return a text in exactly `width` columns, aligned to the left."""
    text = clip(text, width)
    return text + " " * (width - columns(text))


def time_text(seconds: float) -> str:
    """Return a time as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
