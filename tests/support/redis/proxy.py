"""A TCP proxy before Redis that knows commands and their replies: it cuts, swallows, delays, and drops one reply."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

# A batch of claims with its messages; what is larger comes in several pieces.
CHUNK_BYTES = 65536
# The loop answers within microseconds; on a busy machine its thread may wait for its turn.
ANSWER_SECONDS = 120
# Their replies come as pushes (RESP3) or without end (RESP2): such a connection is passed on unread.
SUBSCRIBING = {b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR"}


@dataclass(frozen=True)
class Command:
    """A command as a client sent it; of an EXEC also the commands of its transaction."""

    words: tuple[bytes, ...]
    inside: tuple[Command, ...] = ()

    @property
    def name(self) -> bytes:
        return self.words[0].upper()

    def any(self, wanted: Callable[[Command], bool]) -> bool:
        """Whether it, or one of its transaction, is wanted."""
        return wanted(self) or any(wanted(command) for command in self.inside)


# Tells from a command and Redis's reply to it whether this is the one.
Match = Callable[[Command, bytes], bool]


def has_word(part: bytes) -> Match:
    """A command with this in one of its words, in capitals or not."""
    return lambda command, reply: any(part.upper() in word.upper() for word in command.words)


def frame_end(data: bytes, at: int = 0) -> int:
    """Where the RESP value that begins at `at` ends; -1 when it is not complete."""
    line = data.find(b"\r\n", at)
    if line < 0:
        return -1
    kind, end = data[at : at + 1], line + 2
    if kind in b"$=!":
        length = int(data[at + 1 : line])
        end += length + 2 if length >= 0 else 0
        return end if end <= len(data) else -1
    if kind in b"*~>%":
        for _ in range(max(0, int(data[at + 1 : line])) * (2 if kind == b"%" else 1)):
            end = frame_end(data, end)
            if end < 0:
                return -1
    return end


def frames(buffer: bytearray) -> list[bytes]:
    """Take the complete values from a buffer."""
    data, at, found = bytes(buffer), 0, []
    while at < len(data) and (end := frame_end(data, at)) > 0:
        found.append(data[at:end])
        at = end
    del buffer[:at]
    return found


def words(frame: bytes) -> tuple[bytes, ...]:
    """The words of a command, which is an array of strings."""
    at, found = frame.index(b"\r\n") + 2, []
    while at < len(frame):
        line = frame.index(b"\r\n", at)
        length = int(frame[at + 1 : line])
        found.append(frame[line + 2 : line + 2 + length])
        at = line + length + 4
    return tuple(found)


@dataclass(eq=False)
class Link:
    """A client's connection and ours to Redis for it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    pending: deque[Command] = field(default_factory=deque)
    transaction: list[Command] | None = None
    unread: bool = False
    # Half open: what comes is swallowed, and nobody is told.
    silent: bool = False
    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)

    def cut(self) -> None:
        for writer in (self.client, self.server):
            writer.transport.abort()

    def note_commands(self, data: bytes) -> None:
        """Remember which commands wait for their reply."""
        self.asked += data
        for frame in frames(self.asked):
            self._note(Command(words(frame)))

    def _note(self, command: Command) -> None:
        if command.name in SUBSCRIBING:
            self.unread = True
        elif command.name == b"MULTI":
            self.transaction = []
        elif command.name == b"EXEC" and self.transaction is not None:
            command, self.transaction = Command(command.words, tuple(self.transaction)), None
        elif self.transaction is not None:
            self.transaction.append(command)
        self.pending.append(command)


@dataclass
class Trap:
    """Waits for a reply and drops it, with its connection."""

    wanted: Match
    dropped: threading.Event = field(default_factory=threading.Event)
    command: Command | None = None

    def wait(self) -> None:
        """Wait until it has happened. Raises AssertionError when it does not."""
        assert self.dropped.wait(ANSWER_SECONDS), "no such reply came"


class Proxy:
    """Listens on a port of its own for one Redis server."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._loop = asyncio.new_event_loop()
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._trap: Trap | None = None
        self._delay = 0.0
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._listener = self._do(self._listen())
        self.port = int(self._listener.sockets[0].getsockname()[1])

    def close(self) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_SECONDS)
        self._loop.close()

    # Faults.

    def cut(self) -> int:
        """Cut every connection, with a reset; how many there were."""
        return self._do(self._cut())

    def half_open(self) -> int:
        """Swallow from now on what comes over the connections that there are, both ways; how many there are."""
        return self._do(self._silence())

    def connections(self) -> int:
        """How many there are."""
        return len(self._links)

    def delay(self, seconds: float) -> None:
        """Pass everything on so much later."""
        self._delay = seconds

    def drop_reply(self, wanted: Match) -> Trap:
        """Drop the first such reply from now on, and cut its connection: Redis did it, the client never learns."""
        self._trap = Trap(wanted)
        return self._trap

    def disarm(self) -> None:
        """Drop nothing."""
        self._trap = None

    # How it runs.

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(ANSWER_SECONDS)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._listener.close()
        await self._cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _cut(self) -> int:
        for link in self._links:
            link.cut()
        return len(self._links)

    async def _silence(self) -> int:
        for link in self._links:
            link.silent = True
        return len(self._links)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, to_server)
        self._links.add(link)
        ways = [asyncio.create_task(self._ask(link, reader)), asyncio.create_task(self._answer(link, from_server))]
        self._tasks.update(ways)
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            link.cut()
            await asyncio.gather(*ways, return_exceptions=True)
            self._tasks.difference_update(ways)

    async def _ask(self, link: Link, reader: asyncio.StreamReader) -> None:
        """From the client to Redis."""
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await asyncio.sleep(self._delay)
                if link.silent:
                    continue
                if not link.unread:
                    link.note_commands(data)
                link.server.write(data)
                await link.server.drain()

    async def _answer(self, link: Link, reader: asyncio.StreamReader) -> None:
        """From Redis to the client."""
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await asyncio.sleep(self._delay)
                if link.silent:
                    continue
                if not self._pass(link, data):
                    return
                await link.client.drain()

    def _pass(self, link: Link, data: bytes) -> bool:
        """Give the client what it may have; False when its reply was dropped."""
        link.answered += data
        if link.unread:
            link.client.write(bytes(link.answered))
            link.answered.clear()
            return True
        for frame in frames(link.answered):
            if not frame.startswith(b">") and self._traps(link.pending.popleft(), frame):
                return False
            link.client.write(frame)
        return True

    def _traps(self, command: Command, reply: bytes) -> bool:
        trap = self._trap
        if not trap or not trap.wanted(command, reply):
            return False
        self._trap, trap.command = None, command
        trap.dropped.set()
        return True
