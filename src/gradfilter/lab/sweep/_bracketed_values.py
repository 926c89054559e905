"""Values that are joined by commas, of which one that contains commas is in brackets.

The file imports nothing heavy: ``gradfilter sweep --help`` reads it.
"""

from __future__ import annotations

from gradfilter.lab._usage import UsageError


def split_values(text: str, option: str, name: str) -> list[str]:
    """Split values at commas, but for those within a value that is in brackets.

    Raises:
        UsageError: A bracket in which a value begins is not closed.

    Examples:
        >>> split_values("[etas=0.4,1.1],[a,b] c,head", "--grid", "optimizer_arguments")
        ['etas=0.4,1.1', '[a,b] c', 'head']
    """
    values: list[str] = []
    start = depth = 0
    for at, letter in enumerate(text):
        if letter == "[" and (depth or at == start):  # a bracket elsewhere is a letter like others
            depth += 1
        elif letter == "]" and depth:
            depth -= 1
        elif letter == "," and not depth:
            values.append(text[start:at])
            start = at + 1
    values.append(text[start:])
    if depth:
        raise UsageError(
            f"{option} {name}: expected a closing bracket after every opening one, found "
            f"{values[-1]!r}. A value with commas is written [a,b]."
        )
    return [value[1:-1] if _is_bracketed(value) else value for value in values]


def quoted_value(text: str) -> str:
    """Return a value as `split_values` reads it.

    Examples:
        >>> quoted_value("etas=0.4,1.1"), quoted_value("0.1")
        ('[etas=0.4,1.1]', '0.1')
    """
    return f"[{text}]" if "," in text or text.startswith("[") else text


def _is_bracketed(value: str) -> bool:
    """Return whether the bracket in which a value begins is closed at its end."""
    depth = 0
    for at, letter in enumerate(value):
        depth += (letter == "[") - (letter == "]")
        if depth <= 0:
            return at > 0 and at == len(value) - 1
    return False
