"""stack.ports: what Docker says of a port that is taken becomes a sentence that names the variable."""

import pytest

from config import load
from stack.ports import explain_error_of_docker

SETTINGS = load({"REDIS_PORT": "6400", "REDIS_TLS_PORT": "6401"})
ENDPOINT = "Error response from daemon: driver failed programming external connectivity on endpoint redis-1 (33c): "


@pytest.mark.parametrize(
    ("printed", "begins", "variable"),
    [
        (
            f"{ENDPOINT}Error starting userland proxy: listen tcp4 127.0.0.1:6400: bind: address already in use",
            "port 6400 on 127.0.0.1 is not available for Redis (address already in use): ",
            "REDIS_PORT",
        ),
        (
            f"{ENDPOINT}Bind for 192.0.2.10:6401 failed: port is already allocated",
            "port 6401 on 192.0.2.10 is not available for Redis (port is already allocated): ",
            "REDIS_TLS_PORT",
        ),
        (
            "failed to bind host port for [::1]:6401:172.18.0.2:6380/tcp: address already in use",
            "port 6401 on [::1] is not available for Redis (address already in use): ",
            "REDIS_TLS_PORT",
        ),
    ],
    ids=["another program, engine 26", "another container, engine 26", "another program, engine 28"],
)
def test_a_port_of_redis_that_is_taken_is_named_with_its_variable(printed: str, begins: str, variable: str) -> None:
    assert explain_error_of_docker(printed, SETTINGS) == f"{begins}stop what uses it, or set {variable} in .env"


@pytest.mark.parametrize(
    "printed", [f"{ENDPOINT}Bind for 127.0.0.1:9999 failed: port is already allocated", "no space left on device"]
)
def test_every_other_error_of_docker_stays_as_it_is(printed: str) -> None:
    assert explain_error_of_docker(printed, SETTINGS) == printed
