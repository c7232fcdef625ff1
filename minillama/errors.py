"""The one exception for what a user can mend, and the one place that turns it into an exit code.

Every room raises `InputError` with a single line: what was wrong, where, and what would be right.
"""

import os
import signal
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad arguments or bad input: a missing folder, a damaged file, an unknown name. One line, no traceback."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM after the work so far was made safe; the text says what was kept and how to go on."""


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a command line: 0 success, 2 bad arguments or input, 130 interrupted; 1 (a traceback) is a fault of ours.

    SIGTERM means what Ctrl-C means; both are heard even in a background job of a script, which inherits SIGINT ignored.
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
    except BrokenPipeError:  # the reader of our standard output went away (`| head`): not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
