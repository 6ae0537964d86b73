"""A TCP proxy in front of Redis that parses commands and replies.

It can cut connections, swallow what they carry, and drop the reply to one command.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.support.waiting import T

# A batch of claims with its messages; what is larger comes in several pieces.
CHUNK_BYTES = 65536
# The loop answers within microseconds; on a busy machine its thread may wait for a processor.
ANSWER_SECONDS = 120
# Their replies come as pushes (RESP3) or without end (RESP2): such a connection is passed on without parsing.
SUBSCRIBING = {b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR"}


@dataclass(frozen=True)
class Command:
    """A command as a client sent it; of an EXEC also the commands of its transaction."""

    words: tuple[bytes, ...]
    inside: tuple["Command", ...] = ()

    @property
    def name(self) -> bytes:
        return self.words[0].upper()

    def any(self, wanted: Callable[["Command"], bool]) -> bool:
        """Whether it, or a command of its transaction, is wanted."""
        return wanted(self) or any(wanted(command) for command in self.inside)


# Whether a command and Redis's reply to it are those to look for.
Match = Callable[[Command, bytes], bool]


def has_word(part: bytes) -> Match:
    """Match a command with this in one of its words, in upper or lower case."""
    return lambda command, reply: any(part.upper() in word.upper() for word in command.words)


def frame_end(data: bytes, at: int = 0) -> int:
    """The index after the RESP value that begins at `at`; -1 when the value is not complete."""
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
    """Remove the complete values from a buffer and return them."""
    data, at, found = bytes(buffer), 0, []
    while at < len(data) and (end := frame_end(data, at)) > 0:
        found.append(data[at:end])
        at = end
    del buffer[:at]
    return found


def words(frame: bytes) -> tuple[bytes, ...]:
    """The words of a command, which is a RESP array of strings."""
    at, found = frame.index(b"\r\n") + 2, []
    while at < len(frame):
        line = frame.index(b"\r\n", at)
        length = int(frame[at + 1 : line])
        found.append(frame[line + 2 : line + 2 + length])
        at = line + length + 4
    return tuple(found)


@dataclass(eq=False)
class Link:
    """A client's connection to the proxy, and the proxy's to Redis for it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    pending: deque[Command] = field(default_factory=deque)
    transaction: list[Command] | None = None
    unread: bool = False
    # Half open: what comes is swallowed, and neither side is told.
    silent: bool = False
    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)

    def cut(self) -> None:
        for writer in (self.client, self.server):
            writer.transport.abort()

    def silence(self) -> None:
        self.silent = True

    def note_commands(self, data: bytes) -> None:
        """Record which commands wait for their reply."""
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
    """A reply to drop together with its connection, and the command whose reply was dropped."""

    wanted: Match
    dropped: threading.Event = field(default_factory=threading.Event)
    command: Command | None = None

    def wait(self) -> None:
        """Wait until the reply is dropped. Raises AssertionError when none comes."""
        assert self.dropped.wait(ANSWER_SECONDS), "no such reply came"


class Proxy:
    """A proxy on a port of its own for one Redis server."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._loop = asyncio.new_event_loop()
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._trap: Trap | None = None
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
        """Reset every connection; how many there were."""
        return self._do(self._for_each(Link.cut))

    def half_open(self) -> int:
        """Swallow from now on what the present connections carry, both ways; how many there are."""
        return self._do(self._for_each(Link.silence))

    def connections(self) -> int:
        """How many connections there are."""
        return len(self._links)

    def drop_reply(self, wanted: Match) -> Trap:
        """Drop the next such reply and cut its connection: Redis has run the command, the client never knows."""
        self._trap = Trap(wanted)
        return self._trap

    def disarm(self) -> None:
        """Drop no reply any more."""
        self._trap = None

    # How it runs.

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(ANSWER_SECONDS)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._listener.close()
        await self._for_each(Link.cut)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _for_each(self, action: Callable[[Link], None]) -> int:
        for link in self._links:
            action(link)
        return len(self._links)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, to_server)
        self._links.add(link)
        ways = [
            asyncio.create_task(self._forward(link, reader, to_server, self._forward_commands)),
            asyncio.create_task(self._forward(link, from_server, writer, self._forward_replies)),
        ]
        self._tasks.update(ways)
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            link.cut()
            await asyncio.gather(*ways, return_exceptions=True)
            self._tasks.difference_update(ways)

    async def _forward(
        self,
        link: Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        forward: Callable[[Link, bytes], bool],
    ) -> None:
        """Forward what comes from one side until it ends, or until `forward` returns False."""
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if not link.silent:
                    if not forward(link, data):
                        return
                    await writer.drain()

    def _forward_commands(self, link: Link, data: bytes) -> bool:
        if not link.unread:
            link.note_commands(data)
        link.server.write(data)
        return True

    def _forward_replies(self, link: Link, data: bytes) -> bool:
        """Write replies to the client; False when one was dropped."""
        link.answered += data
        if link.unread:
            link.client.write(bytes(link.answered))
            link.answered.clear()
            return True
        for frame in frames(link.answered):
            if not frame.startswith(b">") and self._is_dropped(link.pending.popleft(), frame):
                return False
            link.client.write(frame)
        return True

    def _is_dropped(self, command: Command, reply: bytes) -> bool:
        trap = self._trap
        if not trap or not trap.wanted(command, reply):
            return False
        self._trap, trap.command = None, command
        trap.dropped.set()
        return True
