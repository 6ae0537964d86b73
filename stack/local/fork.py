"""Run `python -m services …` beside the local stack in a fork of this process.

A new interpreter would import once more what this one has imported, which is most of the time that a command takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from typing import BinaryIO

from config.environment import process_environment, replace_environment
from stack.paths import ROOT
from stack.terminal import catch_interrupts

# Prefixes of the variables that an interpreter and its libraries read once, when they start.
AT_START = ("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_", "OPENSSL_")


def capture(arguments: tuple[str, ...], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run it with this environment, and return what it printed."""
    # Files, because a pipe that nobody reads meanwhile takes 64 KiB.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        code = _run(arguments, environment, {1: output, 2: errors})
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read().decode(), errors.read().decode())


def show(arguments: tuple[str, ...], environment: Mapping[str, str]) -> int:
    """Run it with this environment on the terminal; its exit code."""
    with catch_interrupts():
        return _run(arguments, environment, {})


def _run(arguments: tuple[str, ...], environment: Mapping[str, str], streams: Mapping[int, BinaryIO]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _become(arguments, environment, streams)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(arguments: tuple[str, ...], environment: Mapping[str, str], streams: Mapping[int, BinaryIO]) -> None:
    """Become that program and never return: what the caller has opened and locked is not to be closed here."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in streams.items():
            os.dup2(file.fileno(), number)
        if not can_copy(environment):
            command = [sys.executable, "-m", "services", *arguments]
            os.chdir(ROOT)
            os.execve(command[0], command, dict(environment))
        replace_environment(environment)
        from services.__main__ import main

        main(arguments, prog_name="python -m services")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def can_copy(environment: Mapping[str, str]) -> bool:
    """Whether an interpreter that starts with this environment would be like this one."""
    ours = process_environment()
    differ = {name for name in {*ours, *environment} if ours.get(name) != environment.get(name)}
    # The output is flushed at the end, and the checkout is on the path of this process already.
    differ -= {"PYTHONUNBUFFERED"} | ({"PYTHONPATH"} - set(ours))
    return not any(name.startswith(AT_START) for name in differ)
