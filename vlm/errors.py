"""Errors a user can act on: each message says what is wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class VlmError(Exception):
    """Something the user can mend; the commands print it in one line and exit with 2."""


class UnsupportedTask(VlmError):
    """The model was asked for a task it cannot do."""


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """The nearest known names as a sentence to end an error message with.

    Returns "; did you mean 'a' or 'b'?" when something is near, else "; known: a, b, ..." (at most 20).
    """
    names = sorted({str(k) for k in known})
    near = get_close_matches(word, names, n=n, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(m) for m in near) + "?"
    if not names:
        return ""
    return "; known: " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
