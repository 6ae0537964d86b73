"""python -m config check | show; `reference` and `example` are in test_reference.py."""

from config.settings import VARIABLES
from tests.support.checkout import Checkout
from tests.unit.refusals import run_refused
from tests.unit.secret_settings import MARK, build_secrets


def run_config(checkout: Checkout, command: str, **environment: str) -> tuple[list[str], str]:
    """What a command prints that is not refused: the lines on standard output, and standard error."""
    done = checkout.run("-m", "config", command, **environment)
    assert done.returncode == 0, done
    assert MARK not in done.stdout + done.stderr
    return done.stdout.splitlines(), done.stderr


def test_check_says_that_a_good_configuration_is_good_and_what_to_look_at(checkout: Checkout) -> None:
    secrets = build_secrets(f"{MARK}$#'\"\\@:/% ü")
    assert run_config(checkout, "check", **secrets) == (["The configuration is good."], "")
    output, warnings = run_config(checkout, "check", WORKER_POOL="threads")
    assert output == ["The configuration is good."]
    assert warnings.startswith("warning: WORKER_POOL=threads cannot enforce CELERY_TASK_TIME_LIMIT")


def test_check_names_and_explains_every_mistake(checkout: Checkout) -> None:
    wrong = {"CELERY_BROKER_URL": f"redis://{MARK}@redis/0", "LOG_LEVEL": "loud", "FLOWER_PORT": "http"}
    mistakes = run_refused(checkout, "-m", "config", "check", **build_secrets() | wrong)
    assert [line.partition(": found")[0] for line in mistakes] == [f"error: {variable}" for variable in wrong]
    assert ": found a value that is not shown (it has a user but no password: " in mistakes[0]
    assert "write redis://:secret@host" in mistakes[0]
    assert MARK not in "".join(mistakes)


def test_check_reads_env_of_its_checkout(own_checkout: Checkout) -> None:
    own_checkout.write(".env", "LOG_LEVEL=error\nREDIS_PASSWORD=pa$word\n")
    (mistake,) = run_refused(own_checkout, "-m", "config", "check")
    assert mistake.startswith(f"error: {own_checkout.path / '.env'} line 2: ")


def test_show_prints_what_is_in_force_with_secrets_masked(checkout: Checkout) -> None:
    # Neither URL has a password of its own.
    changes = {"CELERY_BROKER_URL": "", "CELERY_RESULT_BACKEND": "", "FLOWER_READ_ONLY_AUTH": "", "LOG_LEVEL": "debug"}
    output, errors = run_config(checkout, "show", **build_secrets() | changes)
    lines = [line for line in output if line and not line.startswith("#")]
    assert [line.partition("=")[0] for line in lines] == list(VARIABLES)
    in_force = {
        "CELERY_BROKER_URL=redis://:***@redis:6379/0",
        "CELERY_RESULT_BACKEND=redis://:***@redis:6379/1",
        "CELERY_TASK_SOFT_TIME_LIMIT=1740",
        "REDIS_PASSWORD=***",
        "FLOWER_BASIC_AUTH=***",
        "FLOWER_READ_ONLY_AUTH=",
        "LOG_LEVEL=debug",
        "WORKER_POOL=prefork",
        "WORKER_QUEUES=celery",
    }
    assert in_force <= set(lines)
    assert errors == ""


def test_show_of_a_bad_configuration_prints_the_mistakes_alone(checkout: Checkout) -> None:
    (mistake,) = run_refused(checkout, "-m", "config", "show", LOG_LEVEL="loud")
    assert mistake.startswith("error: LOG_LEVEL: found 'loud'; allowed: one of debug, info,")


def test_a_command_that_does_not_exist_is_refused(checkout: Checkout) -> None:
    assert run_refused(checkout, "-m", "config", "chek")[0].startswith("Usage: python -m config")
