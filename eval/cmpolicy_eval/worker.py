"""Environment process of :mod:`cmpolicy_eval.pool`: reads commands on stdin, replies on stdout.

Only ever started by ``EnvPool``, and only reads what its parent process writes.
"""

import os
import pickle
import signal
import sys
import traceback

from cmpolicy_eval.episode import ChunkOutcome
from cmpolicy_eval.pool import Command, Failure, LocalEnvs


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
        envs = LocalEnvs(pickle.load(commands))
    except EOFError:
        return
    except Exception as error:
        envs = _failure(error)  # the answer to every command
    try:
        while True:
            for command in pickle.load(commands):
                pickle.dump(_reply(envs, command), replies, protocol=pickle.HIGHEST_PROTOCOL)
                replies.flush()
    except (EOFError, BrokenPipeError):
        pass  # the parent is done, or gone
    if isinstance(envs, LocalEnvs):
        envs.close()


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
