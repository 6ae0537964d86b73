"""python -m config check | show | reference | example"""

from __future__ import annotations

from subprocess import CompletedProcess

import pytest

from config.reference import DOCUMENT, render_example, render_reference
from config.settings import REMOVED_LIMITS
from tests.support.checkout import Checkout

MARK = "Zq7-s3cret"
SECRETS = {
    "REDIS_PASSWORD": f"{MARK}$#'\"\\@:/% ü",
    "CELERY_RESULT_BACKEND": f"redis://user:{MARK}@redis/1",
    "CELERY_SENTINEL_PASSWORD": MARK,
    "FLOWER_BASIC_AUTH": f"admin:{MARK}",
}


def config(checkout: Checkout, *arguments: str, **environment: str) -> CompletedProcess[str]:
    """Run the command in a checkout without .env, with nothing but `environment`."""
    done = checkout.run("-m", "config", *arguments, **environment)
    assert "Traceback" not in done.stderr
    assert MARK not in done.stdout + done.stderr
    return done


def test_check_says_that_a_good_configuration_is_good(checkout: Checkout) -> None:
    done = config(checkout, "check", **SECRETS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "The configuration is good.\n", "")


def test_check_names_every_mistake_and_exits_with_2(checkout: Checkout) -> None:
    wrong = {"CELERY_BROKER_URL": f"redis://{MARK}@redis/0", "LOG_LEVEL": "loud", "FLOWER_PORT": "http"}
    done = config(checkout, "check", **SECRETS | wrong)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.partition(": found")[0] for line in lines] == [f"error: {variable}" for variable in wrong]


def test_check_names_every_variable_that_was_removed_and_exits_with_2(checkout: Checkout) -> None:
    done = config(checkout, "check", **dict.fromkeys(REMOVED_LIMITS, "96"))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.partition(" is no longer")[0] for line in lines] == [f"error: {name}" for name in REMOVED_LIMITS]


def test_check_warns_and_exits_with_0(checkout: Checkout) -> None:
    done = config(checkout, "check", WORKER_POOL="threads")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: WORKER_POOL=threads cannot enforce CELERY_TASK_TIME_LIMIT")
    assert done.stdout == "The configuration is good.\n"


def test_check_reads_env_of_its_checkout(own_checkout: Checkout) -> None:
    own_checkout.write(".env", "LOG_LEVEL=error\nREDIS_PASSWORD=pa$word\n")
    done = config(own_checkout, "check")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {own_checkout.path / '.env'} line 2: ")
    assert done.stderr.count("\n") == 1


def test_show_prints_what_is_in_force_with_secrets_masked(checkout: Checkout) -> None:
    done = config(checkout, "show", **SECRETS, LOG_LEVEL="debug")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for line in (
        "CELERY_BROKER_URL=redis://:***@redis:6379/0",
        "CELERY_RESULT_BACKEND=redis://user:***@redis:6379/1",
        "REDIS_PASSWORD=***",
        "FLOWER_BASIC_AUTH=***",
        "LOG_LEVEL=debug",
        "WORKER_POOL=prefork",
    ):
        assert line in lines


def test_show_of_a_bad_configuration_prints_the_mistakes_alone(checkout: Checkout) -> None:
    done = config(checkout, "show", **SECRETS, LOG_LEVEL="loud")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: LOG_LEVEL: found 'loud'; allowed: one of debug, info,")


# The copy has no docs/, so that the reference is what is written into it: the tables.
TABLES = render_reference().removeprefix(DOCUMENT.read_text(encoding="utf-8").partition("## ")[0])


@pytest.mark.parametrize(("command", "text"), [("reference", TABLES), ("example", render_example())])
def test_a_document_is_printed_whatever_the_configuration(checkout: Checkout, command: str, text: str) -> None:
    done = config(checkout, command, LOG_LEVEL="loud")
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")


def test_a_command_that_does_not_exist_is_refused(checkout: Checkout) -> None:
    done = config(checkout, "chek")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: python -m config" in done.stderr
