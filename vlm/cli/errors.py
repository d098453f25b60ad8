"""How every command ends when something goes wrong: one line on stderr, and an exit status."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from vlm.cli.processes import lost_process
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
    except RuntimeError as error:
        if debug or (told := lost_process(error)) is None:
            raise
        print("error: " + " ".join(told.split()), file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)  # threads of the group may wait for the process that is gone


def run(app: typer.Typer) -> NoReturn:
    """Run a command and end Python; a mistake in how it is called is one line with exit status 2, too."""
    try:
        status = app(standalone_mode=False)
    except Exception as caught:  # typer brings its own click, or takes the installed one: no common class to name
        error: Any = caught
        if type(error).__name__ == "Abort":
            print("aborted", file=sys.stderr)
            sys.exit(1)
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
        else:
            command = getattr(getattr(error, "ctx", None), "command_path", "")
            hint = f"; see {command} --help" if command else ""
            print("error: " + " ".join(error.format_message().split()).rstrip(".") + hint, file=sys.stderr)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


def _is_mendable(error: Exception) -> bool:
    if isinstance(error, OSError):
        kinds = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
        return isinstance(error, kinds) or error.errno in _MENDABLE
    return True
