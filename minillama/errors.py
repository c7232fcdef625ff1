"""The exception for bad input, and the one function that turns it into an exit code.

All packages raise `InputError` with a single line: what was wrong, where, and what would be right.
"""

import os
import signal
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad arguments or bad input: a missing folder, a damaged file, an unknown name. One line, no traceback."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM after finished work was saved; the text says what was kept and how to resume."""


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a command: 0 success, 2 bad arguments or input, 130 interrupted. Other exceptions are bugs and pass through.

    SIGTERM acts like Ctrl-C. Both handlers are set here, since a background job of a script inherits SIGINT ignored.
    """
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.default_int_handler)
    try:
        return main() or 0
    except InputError as error:
        print("error:", " ".join(str(error).split("\n")), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        if error.name != "kernels":
            raise
        print("error: Hugging Face's package `kernels` hides ours here; pip uninstall kernels", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our standard output has closed it (`| head`): no bug of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
