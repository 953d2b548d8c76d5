"""Texts from outside are on one line, with nothing hidden, in every output."""

import ast
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import absld
from absld.text import clip, column, columns, printable, wrap

FOLDER = Path(absld.__file__).parent
ANY_TEXT = st.text(st.characters(codec=None), max_size=20)  # with halves of surrogate pairs


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("abc\u202etxt.exe", r"abc\u202etxt.exe"),
        ("\u2066a\u2069\u200f\ufeff", r"\u2066a\u2069\u200f\ufeff"),
        ("\u2028\u2029\x85\x7f\x00", r"\u2028\u2029\x85\x7f\x00"),
        ("b\udcff", r"b\udcff"),
        ("\U000e0041", r"\U000e0041"),
        ("caf\u00e9 \u65e5\u672c \u05d0\u200d\u05d1 1\u00a0% a\u3000b", None),
        (r"C:\new \x1b", None),
    ],
)
def test_what_is_not_shown_as_itself_is_escaped(text, shown):
    assert printable(text) == (text if shown is None else shown)


@given(ANY_TEXT)
def test_a_printable_text_has_one_line_and_no_control_and_stays_as_it_is(text):
    shown = printable(text)
    assert len((shown + ".").splitlines()) == 1 and printable(shown) == shown
    kinds = {unicodedata.category(letter) for letter in shown if letter not in "\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown.encode()


@given(ANY_TEXT, st.integers(3, 12))
def test_a_clipped_text_fits_and_a_column_is_filled(text, width):
    assert columns(clip(text, width)) <= width == columns(column(text, width))


@given(ANY_TEXT, st.integers(6, 30))
@example("000漢", 6)  # whose last letter begins in the last column
def test_a_wrapped_text_fits_and_is_whole(text, width):
    lines = wrap(text, width, "  ", "    ")
    assert all(columns(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(printable(text).split())


def test_wide_letters_wrap_at_their_width():
    assert wrap("漢字かな交じり文", 8) == ["漢字かな", "交じり文"]
    assert wrap("ab cd  e", 4) == ["ab", "cd", "e"] and wrap("ab  cd", 6) == ["ab  cd"]
    assert wrap("to 123456", 4, "- ") == ["- to", "1234", "56"] and wrap(" ", 4) == []


def test_only_one_function_prints_texts():
    """All others give it their lines, whose texts it escapes; JSON alone is printed apart, as ASCII."""
    printers = re.compile(
        r"print|(typer|click)\.(s?echo)|sys\.std(out|err)\.write|traceback\.print.*"
    )
    calls = [
        (path.relative_to(FOLDER).as_posix(), ast.unparse(node))
        for path in sorted(FOLDER.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and printers.fullmatch(ast.unparse(node.func))
    ]
    assert calls == [
        ("cli/output.py", "print(output.document, flush=True)"),
        ("cli/printing.py", "print(''.join(texts), file=stream, flush=True)"),
    ]
