"""How every command ends when something goes wrong: one line on stderr, and an exit status."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vlm.errors import VlmError

# What the machine or the user can mend; any other OSError is ours and keeps its traceback.
_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Around a command's body: what a user can mend becomes `error: ...` on stderr and exit status 2; Ctrl-C gives 130.

    debug: let errors through, so that Python prints the traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    except (VlmError, OSError) as error:
        if debug or not _is_mendable(error):
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(2) from None


def _is_mendable(error: Exception) -> bool:
    if isinstance(error, OSError):
        kinds = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
        return isinstance(error, kinds) or error.errno in _MENDABLE
    return True
