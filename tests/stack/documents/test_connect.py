"""docs/connect.md, each step as it is printed: other Compose projects, the host, other machines."""

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml

from config.environment import read_env_file
from tests.stack.conftest import SETTINGS
from tests.stack.containers.deployment import COMMAND_SECONDS, ROOT, Stack, clone, environment
from tests.stack.deployment import run
from tests.stack.documents.connecting import (
    ADDRESS,
    BLOCK,
    CHECKOUT,
    PAGE,
    PORT,
    TLS_PORT,
    carry_out,
    changed,
    local_stack,
    names,
    on_host,
    printed,
    python,
    urls,
)
from tests.stack.processes.deployment import Local
from tests.support.ports import free_port
from tests.support.redis.server import require_openssl, require_tls

# An address of this host that nothing else listens on: all of 127.0.0.0/8 is loopback.
LOCAL_ADDRESS = "127.0.0.2"
ADD = "from producer import send, wait; print(wait(send('services.tasks.arithmetic.add', 4, 3), 300).value)"


def test_every_block_of_the_page_is_tried() -> None:
    text = PAGE.read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    assert [name for name, _ in BLOCK.findall(text) if f'"{name}"' not in tests] == []
    assert text.count("```") == 2 * len(BLOCK.findall(text)), "a block has no name"


def refused(address: str, port: str) -> bool:
    """Whether nobody listens there."""
    try:
        socket.create_connection((address, int(port)), 60).close()
    except ConnectionRefusedError:
        return True
    return False


def asks_for_password(client: redis.Redis) -> bool:
    """Whether Redis answers a client without a password, and lets it do nothing."""
    with client, pytest.raises(redis.AuthenticationError):
        client.ping()
    return True


# ---- another Compose project


def test_the_network_that_the_page_names_is_that_of_the_stack(docker_engine: None, tmp_path: Path) -> None:
    # In a copy: Compose reads .env and .env.tasks of the directory that it is in.
    done = run(
        ["docker", "compose", "config"], clone(tmp_path / "clone"), environment(REDIS_PASSWORD="x"), COMMAND_SECONDS
    )
    networks = yaml.safe_load(done.stdout)["networks"].values()
    assert "stalk_broker" in [network["name"] for network in networks if network.get("internal")]


@pytest.fixture
def shop(stack: Stack, tmp_path: Path) -> Iterator[Stack]:
    """A Compose project of somebody else, whose `web` is as the page has it, and which has a `redis` of its own."""
    directory = tmp_path / "shop"
    directory.mkdir()
    (directory / "compose.yaml").write_text(printed("other-project", names(stack)))
    examples = readable(tmp_path / "machine")
    image = {"image": f"{stack.project}-app", "pull_policy": "never"}
    web = image | {"entrypoint": ["python"], "volumes": [f"{examples}:{examples}:ro"]}
    own = {"services": {"web": web, "redis": image | {"entrypoint": ["sleep", "600"]}}}
    (directory / "compose.override.yaml").write_text(yaml.safe_dump(own))
    shop = Stack(directory, f"{stack.project}-shop", STALK_PASSWORD=read_env_file(stack.env_file)["REDIS_PASSWORD"])
    shop.compose("up", "--detach", "redis")
    yield shop
    shop.compose("down", "--remove-orphans", "--timeout", "1")
    assert not shop.remains()


def readable(directory: Path) -> Path:
    """A directory with the examples that every user can read, as a container's has to."""
    shutil.copytree(ROOT / "examples", directory, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (directory, *directory.iterdir()):
        path.chmod(0o755)
    return directory


def test_another_project_sends_tasks_over_the_stacks_network(shop: Stack, tmp_path: Path) -> None:
    done = shop.compose("run", "--rm", "-T", "web", str(tmp_path / "machine" / "plain.py"), "1000")
    assert "SUCCESS: " in done.stdout


@pytest.mark.slow
def test_the_stack_stops_and_starts_under_another_project(stack: Stack, shop: Stack) -> None:
    shop.compose("run", "--detach", "web", "-c", "import time; time.sleep(600)")
    stack.make("down")
    stack.make("up")
    assert stack.call("services.tasks.arithmetic.add", 4, 3)[0]["result"] == 7


# ---- the host


@pytest.mark.slow
def test_the_host_reaches_redis_on_loopback_alone_and_only_with_the_password(
    first_stack: tuple[Stack, str], bridge: str
) -> None:
    stack, _ = first_stack
    port = str(free_port())
    with changed(stack, printed("host-env", {}), REDIS_PORT=port):
        carry_out("host-up", stack.directory, stack.environment(), {})
        reached = urls("host-urls", stack.directory, stack.environment(), {PORT: f":{port}"})
        assert python(on_host(**reached), "-c", ADD).stdout == "7\n"
        assert asks_for_password(redis.Redis(port=int(port)))
        assert refused(bridge, port)
        # The network that publishes the port gives Redis no way to the world.
        assert stack.network("published")["Options"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert refused("127.0.0.1", port)


@pytest.fixture(scope="module")
def bridge(docker_engine: None) -> str:
    """An address of this host that is not loopback: Docker's own, which containers reach too."""
    asked = ["docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"]
    return subprocess.run(
        asked, env=environment(), capture_output=True, text=True, check=True, timeout=COMMAND_SECONDS
    ).stdout.strip()


# ---- another machine, Stalk in containers


@pytest.fixture(scope="module")
def tls(first_stack: tuple[Stack, str], bridge: str) -> Iterator[tuple[Stack, dict[str, str]]]:
    """The stack with TLS on an address of this host, and what the page's names are there."""
    stack, _ = first_stack
    require_openssl()
    port = str(free_port())
    replaced = {ADDRESS: bridge, TLS_PORT: f":{port}"}
    carry_out("tls-certificates", stack.directory, stack.environment(), replaced)
    with changed(stack, printed("tls-env", replaced), REDIS_TLS_PORT=port):
        carry_out("tls-up", stack.directory, stack.environment(), replaced)
        yield stack, replaced


@pytest.fixture
def machine(tls: tuple[Stack, dict[str, str]], tmp_path: Path) -> "Machine":
    stack, replaced = tls
    return Machine(stack, replaced, readable(tmp_path / "machine"))


class Machine:
    """Another machine: a container on no network of the stack, with the examples and the authority."""

    def __init__(self, stack: Stack, replaced: dict[str, str], directory: Path) -> None:
        self._stack, self._directory = stack, directory
        shutil.copy(stack.directory / ".stalk" / "tls" / "ca.crt", directory)
        variables = stack.environment(password=read_env_file(stack.env_file)["REDIS_PASSWORD"])
        self.urls = urls("tls-urls", directory, variables, replaced)

    def add(self, **variables: str) -> str:
        """What a program prints that sends a task and waits for it, or why it fails."""
        given = [f"--env={name}={value}" for name, value in (self.urls | variables).items()]
        place = (f"--volume={self._directory}:{self._directory}:ro", f"--workdir={self._directory}", "--network=bridge")
        command = ("--entrypoint=python", f"{self._stack.project}-app", "-c", ADD)
        return self._stack.docker("run", "--rm", *place, *given, *command, check=False).splitlines()[-1]


@pytest.mark.slow
def test_another_machine_sends_tasks_with_tls(machine: Machine) -> None:
    assert machine.add() == "7"


@pytest.mark.slow
def test_another_machine_does_not_talk_to_a_redis_that_it_has_no_reason_to_trust(machine: Machine) -> None:
    url = machine.urls["CELERY_BROKER_URL"].partition("&ssl_ca_certs")[0]
    assert "CERTIFICATE_VERIFY_FAILED" in machine.add(CELERY_BROKER_URL=url)


@pytest.mark.slow
def test_tls_is_spoken_on_the_chosen_address_alone_and_only_with_the_password(
    tls: tuple[Stack, dict[str, str]],
) -> None:
    stack, replaced = tls
    address, port = replaced[ADDRESS], replaced[TLS_PORT].removeprefix(":")
    published = stack.inspect(stack.ids("redis")[0])["NetworkSettings"]["Ports"]
    assert published == {"6379/tcp": None, "6380/tcp": [{"HostIp": address, "HostPort": port}]}
    assert refused("127.0.0.1", port)
    authority = str(stack.directory / ".stalk" / "tls" / "ca.crt")
    assert asks_for_password(redis.Redis(address, int(port), ssl=True, ssl_ca_certs=authority))


@pytest.mark.slow
def test_a_new_certificate_changes_nothing_for_other_machines(
    tls: tuple[Stack, dict[str, str]], machine: Machine
) -> None:
    stack, replaced = tls
    before = served(replaced)
    told = carry_out("tls-renew", stack.directory, stack.environment(), replaced)
    assert told.startswith("notAfter=")
    stack.wait_healthy()
    assert served(replaced) != before
    assert machine.add() == "7"


def served(replaced: dict[str, str]) -> str:
    """The certificate that Redis shows."""
    return ssl.get_server_certificate((replaced[ADDRESS], int(replaced[TLS_PORT].removeprefix(":"))), timeout=60)


@pytest.mark.slow
def test_workers_of_another_machine_join(tls: tuple[Stack, dict[str, str]], tmp_path: Path) -> None:
    stack, replaced = tls
    second = Stack(clone(tmp_path / "second", mode_mask=0o077), f"{stack.project}-second", **SETTINGS)
    copied = {"scp first:stalk/": f"cp {stack.directory}/"}
    try:
        carry_out("join-files", second.directory, second.environment(), copied)
        second.set_variables(printed("join-env", replaced))
        carry_out("join-up", second.directory, second.environment(), {})
        nodes = {f"node0@{identifier[:12]}" for identifier in second.ids("worker")}
        stack.wait(lambda: nodes <= set(stack.nodes_in_flower()), "Flower shows the worker that has joined")
        stack.make("scale", WORKERS="0")
        assert stack.call("services.tasks.arithmetic.add", 4, 3)[0]["result"] == 7
        assert second.ids("redis") == []
    finally:
        second.make("clean", check=False, YES="1")
        second.remove()
        stack.make("scale", WORKERS="1")


# ---- another machine, Stalk as processes


@pytest.fixture(scope="module")
def local_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Local, dict[str, str]]]:
    """The stack as processes, with TLS on an address of this host."""
    require_tls(tmp_path_factory.mktemp("redis"))
    port = str(free_port())
    replaced = {ADDRESS: LOCAL_ADDRESS, TLS_PORT: f":{port}"}
    with local_stack("first", REDIS_TLS_PORT=port) as local:
        local.make("up")
        carry_out("tls-certificates", local.directory, local.environment(), replaced)
        (line,) = [line for line in printed("tls-env", replaced).splitlines() if "COMPOSE" not in line]
        local.env_file.write_text(f"{local.env_file.read_text()}{line}\n")
        carry_out("tls-up", local.directory, local.environment(), replaced)
        yield local, replaced


def trusting(local: Local, replaced: dict[str, str], directory: Path) -> dict[str, str]:
    """The environment of a program in a directory that has the authority."""
    shutil.copy(local.state / "tls" / "ca.crt", directory)
    return on_host(**urls("tls-urls", directory, local.environment(password=local.password()), replaced))


@pytest.mark.slow
def test_local_processes_speak_tls_on_the_chosen_address_alone(
    local_tls: tuple[Local, dict[str, str]], tmp_path: Path
) -> None:
    local, replaced = local_tls
    variables = trusting(local, replaced, tmp_path)
    assert python(variables, "-c", ADD).stdout == "7\n"
    assert refused("127.0.0.1", replaced[TLS_PORT].removeprefix(":"))
    # The same address by a name that the certificate does not have.
    variables["CELERY_BROKER_URL"] = variables["CELERY_BROKER_URL"].replace(LOCAL_ADDRESS, "127.2")
    assert "CERTIFICATE_VERIFY_FAILED" in python(variables, "-c", ADD).stderr


@pytest.mark.slow
def test_local_processes_take_a_new_certificate(local_tls: tuple[Local, dict[str, str]], tmp_path: Path) -> None:
    local, replaced = local_tls
    variables, before = trusting(local, replaced, tmp_path), served(replaced)
    carry_out("tls-certificates", local.directory, local.environment(), replaced)
    local.make("up")
    assert served(replaced) != before
    assert python(variables, "-c", ADD).stdout == "7\n"


@pytest.mark.slow
def test_local_workers_of_another_machine_join(local_tls: tuple[Local, dict[str, str]]) -> None:
    local, replaced = local_tls
    with local_stack("second") as second:
        carry_out("join-files", second.directory, second.environment(), {"scp first:stalk/": f"cp {local.directory}/"})
        lines = printed("join-env-local", replaced | {CHECKOUT: str(second.directory)})
        second.env_file.write_text(f"{second.env_file.read_text()}{lines}")
        carry_out("join-up", second.directory, second.environment(), {})
        assert "redis" not in second.processes()
        local.make("scale", WORKERS="0")
        assert local.run_task("services.tasks.arithmetic.add", 4, 3) == 7
        local.make("scale", WORKERS="1")


# ---- mistakes


def test_certificates_need_a_name(tmp_path: Path) -> None:
    done = run([str(ROOT / "docker" / "certificates")], tmp_path, environment(), COMMAND_SECONDS)
    assert done.returncode == 2
    assert "docker/certificates 192.0.2.10" in done.stderr


def test_redis_says_which_certificate_it_misses(tmp_path: Path) -> None:
    variables = environment(REDIS_PASSWORD="x", STALK_REDIS_TLS=str(tmp_path))
    done = run(["sh", str(ROOT / "docker" / "redis" / "start")], tmp_path, variables, COMMAND_SECONDS)
    assert (done.returncode, done.stderr) == (
        2, f"error: there is no certificate in {tmp_path}; make one: docker/certificates ADDRESS\n"
    )  # fmt: skip
