"""Replaces itself by a command that the kernel kills as soon as its parent ends, even by kill -9.

Run as a file (`python -IS launch.py PARENT_PID COMMAND...`), not imported: a hook between fork and
exec would not be safe in a process with threads, as one with torch and Kafka clients is.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>; other systems than Linux lack it and go without

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked to watch
            sys.exit(1)
    os.execv(command[0], command)
