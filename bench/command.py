"""How a benchmark ends when it is stopped, or when something is not as it needs it."""

import signal
import sys
from collections.abc import Callable

from schemas.exceptions import StarcastError


def exit_code(main: Callable[[], int]) -> int:
    """What a benchmark's `main` gives, or what tells that it did not come to its end.

    SIGTERM ends it as Ctrl-C does, so that its processes end and its folders go. What is wrong is
    said in a line, without a stack trace.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except StarcastError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
