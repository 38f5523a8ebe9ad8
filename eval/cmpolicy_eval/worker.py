"""Environment process of :mod:`cmpolicy_eval.pool`: reads commands on stdin, replies on stdout.

Only ever started by ``EnvPool``, and only reads what its parent process writes. It ends with its
parent: at the end of file, and, while an environment keeps it busy, by a signal that Linux sends or
by a thread that watches the parent.
"""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from typing import IO

import cloudpickle

from cmpolicy_eval.episode import ChunkOutcome
from cmpolicy_eval.pool import LENGTH, Command, Failure, LocalEnvs, Setup, Spaces

_PR_SET_PDEATHSIG = 1  # of Linux
_WATCH_INTERVAL = 1.0  # s


def main() -> None:
    """Serve until end of file."""
    # Ctrl-C goes to the whole group; the parent decides, and this process ends with its pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Replies get a private copy of stdout; whatever an environment prints goes to stderr.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    commands = sys.stdin.buffer
    envs: LocalEnvs | Failure
    try:
        setup = pickle.load(commands)
        assert isinstance(setup, Setup)
        if setup.dies_with_parent:
            _die_with_parent()
        threading.Thread(target=_watch, args=(setup.parent,), daemon=True).start()
        envs = LocalEnvs(setup)
    except EOFError:
        return
    except Exception as error:
        envs = _failure(error)  # the answer to every command
    try:
        _send(replies, envs.spaces if isinstance(envs, LocalEnvs) else envs)
        while True:
            for command in pickle.load(commands):
                _send(replies, _reply(envs, command))
    except (EOFError, BrokenPipeError):
        pass  # the parent is done, or gone
    if isinstance(envs, LocalEnvs):
        envs.close()


def _send(replies: IO[bytes], message: object) -> None:
    by_value = isinstance(message, Spaces)  # they may be of a class that came by value
    data = cloudpickle.dumps(message) if by_value else pickle.dumps(message, protocol=5)
    replies.write(LENGTH.pack(len(data)))
    replies.write(data)
    replies.flush()


def _watch(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_WATCH_INTERVAL)
    os._exit(1)


def _die_with_parent() -> None:
    """Let the system end this process with its parent, also while it is stopped or hangs."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux: the thread has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _reply(envs: LocalEnvs | Failure, command: Command) -> ChunkOutcome | Failure:
    if isinstance(envs, Failure):
        return envs
    try:
        return envs.run(command)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Failure:
    return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())


if __name__ == "__main__":
    main()
