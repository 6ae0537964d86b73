"""Forks Python programs of the stack from a process that has imported Celery already: 10 ms of CPU each, not 1.3 s.

Run as a script this is the server; imported, its client. A forked program differs from one that a new interpreter runs
in its speed alone: environment, directory, session, streams, signals and command line are its own, in /proc too, and
where it becomes another Python program (os.execve) it stays the same process. The server imports only modules that do
not read their environment at import. Tests about how a program starts or becomes another take a new interpreter.
"""

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# Imports that take long. Celery loads most of it late, when a worker, a beat or a pool is made.
LIBRARIES = (
    "celery.bin.celery celery.bin.worker celery.bin.beat celery.apps.worker celery.apps.beat celery.worker.consumer "
    "celery.worker.components celery.worker.strategy celery.worker.autoscale celery.concurrency.prefork "
    "celery.concurrency.thread celery.concurrency.solo celery.backends.redis celery.app.amqp celery.app.control "
    "celery.app.events celery.app.log celery.app.builtins celery.loaders.app celery.fixups.django celery.events.state "
    "celery.utils.static billiard.pool kombu.transport.redis kombu.pidbox kombu.asynchronous.hub redis redis.sentinel "
    "redbeat flower.command flower.app pydantic supervisor.supervisord supervisor.rpcinterface "
    "supervisor.http supervisor.xmlrpc orjson encodings.idna"
)
# It creates the application from the environment of the process that imports it.
READS_ENVIRONMENT = frozenset({"services.app"})
# Variables of Python that a forked program respects; one with any other needs a new interpreter.
FORKABLE = frozenset({"PYTHONUNBUFFERED", "PYTHONPATH"})
# The server starts with a command line and an environment of this length, to be overwritten with those of a program.
COMMAND_LINE_BYTES, ENVIRONMENT_BYTES = 8192, 65536
# A request holds an environment; the kernel takes ten times as much in one piece.
REQUEST_BYTES = ENVIRONMENT_BYTES
# A pid or an exit code.
REPORT = struct.Struct("q")
IMPORT_SECONDS = 120


class ForkServer:
    """The client; starts the server with the first program.

    With `path` the server imports the stack's code from there too, which must not change then.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    @staticmethod
    def takes(command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Whether this is `python -m …` or `python -c …`, with no variable that only a new interpreter reads."""
        unknown = [name for name in environment if name.startswith("PYTHON") and name not in FORKABLE]
        size = sum(len(name) + len(value) + 2 for name, value in environment.items())
        python = list(command[:2]) in ([sys.executable, "-m"], [sys.executable, "-c"])
        return python and not unknown and 2 * size < ENVIRONMENT_BYTES

    def fork(
        self, command: Sequence[str], environment: Mapping[str, str], directory: Path, output: int, errors: int
    ) -> "Forked":
        """Fork a program that writes to these file descriptors."""
        program = {"command": list(command), "environment": dict(environment), "directory": str(directory)}
        request = json.dumps(program).encode()
        reports, reporter = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._lock, reporter:
            socket.send_fds(self._connect(), [request], [output, errors, reporter.fileno()])
        return Forked(command, reports)

    def close(self) -> None:
        """End the server; the programs that it forked run on."""
        if self._process and self._requests:
            self._requests.close()
            self._process.wait(IMPORT_SECONDS)

    def _connect(self) -> socket.socket:
        if not self._requests:
            self._requests, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with other:
                padding = {"STALK_FORK_SERVER": "x" * ENVIRONMENT_BYTES}
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(self._path or ""), str(other.fileno()), "x" * COMMAND_LINE_BYTES],
                    env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", **padding},
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    pass_fds=[other.fileno()],
                    # Not to be stopped together with pytest before pytest has ended its tests.
                    start_new_session=True,
                )
        return self._requests


class Forked:
    """A forked program, with the interface of subprocess.Popen."""

    def __init__(self, command: Sequence[str], reports: socket.socket) -> None:
        self.args, self._reports = list(command), reports
        self.returncode: int | None = None
        self._reports.settimeout(IMPORT_SECONDS)
        self.pid = self._read_number()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._read_code(0)

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        code = self._read_code(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _read_code(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._reports], [], [], timeout)[0]:
            self.returncode = self._read_number()
            self._reports.close()
        return self.returncode

    def _read_number(self) -> int:
        report = self._reports.recv(REPORT.size, socket.MSG_WAITALL)
        assert report, f"the process that forked {self.args} has ended, so its exit code is unknown"
        return int(REPORT.unpack(report)[0])


# Has imported libraries only: for code that a test changes.
LIBRARIES_ONLY = ForkServer()
atexit.register(LIBRARIES_ONLY.close)

# From here on: the server.


def serve(requests: socket.socket) -> None:
    """Fork for each request a process that runs a program and reports what becomes of it, until the client is gone."""
    # The kernel clears away those processes when they end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, REQUEST_BYTES, 3)
        if not request:
            return
        if not os.fork():
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            run_and_report(Program(**json.loads(request)), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def run_and_report(program: "Program", output: int, errors: int, reporter: int) -> NoReturn:
    """Fork a program; report its pid, and then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        # All else that is open here closes by itself, as in a program that was executed.
        program.begin(output, errors)
    # Whoever reads them has to see their end when the program ends.
    os.close(output)
    os.close(errors)
    with socket.socket(fileno=reporter) as reports:
        report(reports, pid)
        report(reports, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def report(reporter: socket.socket, number: int) -> None:
    """Send a number to a client, who may be gone."""
    with suppress(OSError):
        reporter.sendall(REPORT.pack(number))


class Program:
    """A Python program that takes over a process in which another one ran."""

    def __init__(self, command: list[str], environment: dict[str, str], directory: str) -> None:
        self._command, self._environment, self._directory = command, environment, directory

    def begin(self, output: int, errors: int) -> NoReturn:
        """Run in a child of the server."""
        os.setsid()
        os.dup2(output, 1)
        os.dup2(errors, 2)
        remembered.update(sys.modules)
        os.execve = replace_program  # type: ignore[assignment]
        self.run()

    def run(self) -> NoReturn:
        """Remove all traces of the program before, run, and end as an interpreter does."""
        close_uninheritable()
        reset_signals()
        forget_modules()
        os.chdir(self._directory)
        more = self._environment.get("PYTHONPATH", "")
        sys.path[:] = [self._directory, *filter(None, more.split(os.pathsep)), *LIBRARY_PATH]
        atexit._clear()
        os.environ.clear()
        os.environ.update(self._environment)
        time.tzset()
        write_to_proc(self._command, self._environment)
        sys.argv = self._command[1:2] + self._command[3:]
        # Lines as they are written, whatever PYTHONUNBUFFERED says.
        sys.stdout = sys.__stdout__ = open_unbuffered(1)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = open_unbuffered(2)  # type: ignore[misc]
        gc.collect()
        # Frames of the program before are still on the stack; their objects must not be collected.
        gc.freeze()
        code = run_main(*self._command[1:3])
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        os._exit(code)


def open_unbuffered(descriptor: int) -> io.TextIOWrapper:
    """A stream without a buffer."""
    return io.TextIOWrapper(io.FileIO(descriptor, "wb", closefd=False), "utf-8", "backslashreplace", write_through=True)


def run_module(name: str) -> None:
    """Run a module as the main one."""
    # A new interpreter has not imported it before; a package it would.
    if not hasattr(sys.modules.get(name), "__path__"):
        forgotten.append(sys.modules.pop(name, None))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_code(code: str) -> None:
    """Run a text as the main module."""
    forgotten.append(sys.modules["__main__"])
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(code, main.__dict__)  # noqa: S102 - a program of the tests


def run_main(option: str, argument: str) -> int:
    """Run the module or the code that a command line names; the exit code."""
    try:
        {"-m": run_module, "-c": run_code}[option](argument)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        print(ended.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# sys.modules when the child was forked, and modules loaded since, kept so that they are not finalised.
LIBRARY_PATH = sys.path[1:]
remembered: dict[str, Any] = {}
forgotten: list[Any] = []
execute = os.execve


def replace_program(file: Any, command: Any, environment: Any) -> NoReturn:
    """Replace os.execve: run another Python program in this process, execute anything else."""
    if list(command[:2]) == [sys.executable, "-m"]:
        Program(list(command), dict(environment), str(Path.cwd())).run()
    execute(file, command, environment)


def close_uninheritable() -> None:
    """Close the descriptors that an executed program would not inherit."""
    for path in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            if int(path.name) > 2 and not os.get_inheritable(int(path.name)):
                os.close(int(path.name))


def reset_signals() -> None:
    """Reset handlers as a new interpreter does: caught signals to their default, ignored ones stay ignored."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def forget_modules() -> None:
    """Forget the modules that the program before has imported from its own directory."""
    for name, module in list(sys.modules.items()):
        if name not in remembered and str(getattr(module, "__file__", None) or "").startswith(f"{sys.path[0]}/"):
            forgotten.append(sys.modules.pop(name))


def write_to_proc(command: list[str], environment: dict[str, str]) -> None:
    """Overwrite the memory from which /proc shows a process's command line and environment."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # proc(5): arg_start, arg_end, env_start and env_end are fields 48 to 51; the state, field 3, is the first here.
    for start, end, words in (
        (int(fields[45]), int(fields[46]), command),
        (int(fields[47]), int(fields[48]), [f"{name}={value}" for name, value in environment.items()]),
    ):
        text = b"".join(os.fsencode(word) + b"\0" for word in words)
        room = end - start
        ctypes.memset(start, 0, room)
        ctypes.memmove(start, text[: room - 1], min(len(text), room - 1))


def import_all(path: str) -> None:
    """Import everything that reads nothing of its environment."""
    # The script's own directory has a package redis.
    sys.path[0] = "/"
    for name in LIBRARIES.split():
        importlib.import_module(name)
    if path:
        import_code(path)


def import_code(path: str) -> None:
    """Import the stack's own modules."""
    sys.path[0] = path
    for package in ("config", "services"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            name = module.name
            if name not in READS_ENVIRONMENT and not name.startswith("services.tasks.") and "__main__" not in name:
                importlib.import_module(name)
    assert not READS_ENVIRONMENT & set(sys.modules), "services.app was created from the environment of the fork server"


if __name__ == "__main__":
    import_all(sys.argv[1])
    # Forked programs share this memory until they write to it.
    gc.collect()
    gc.freeze()
    asked = socket.socket(fileno=int(sys.argv[2]))
    asked.set_inheritable(False)
    serve(asked)
