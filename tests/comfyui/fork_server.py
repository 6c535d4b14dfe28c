"""Start ComfyUI's process once, and run scripts in forks of it, for `scripts.py`.

    COMFYUI/.venv/bin/python fork_server.py COMFYUI [OPTION ...]

The options are further ones of ComfyUI's command line. Each line of the input is a job, as JSON: a
script, its arguments, and two files for what it prints to stdout and stderr. A fork runs it as
Python would, so that what it changes is gone when it ends, and its exit status is the line that
answers.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from typing import NoReturn

from inside import FOLDER, start


def main(comfyui: str, *options: str) -> None:
    """Run jobs until the input ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what ComfyUI prints is no answer
    start(comfyui, *options)
    for line in sys.stdin:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            run(*json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{status}\n".encode())


def run(script: str, arguments: list[str], out: str, log: str) -> NoReturn:
    """Run a script in this process, and end it."""
    for descriptor, file in ((1, out), (2, log)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    sys.argv, sys.path[:0], status = [script, *arguments], [str(FOLDER)], 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
