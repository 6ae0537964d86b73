"""config.settings, config.types and config.loading"""

import os
import traceback
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from config import ConfigError, load
from config.celery import derive_soft_limit
from config.reference import format_value, read_help, render_settings
from config.settings import GROUPS, REMOVED_LIMITS, SECRETS, VARIABLES, Variable
from tests.unit.secret_settings import MARK, build_secrets

ROOT = Path(__file__).resolve().parents[3]
# Any text is allowed in these.
FREE_TEXT = {"REDIS_PASSWORD", "CELERY_SENTINEL_PASSWORD", "CELERY_SENTINEL_MASTER", "CELERY_IMPORTS"}
SPECIAL = ("$", "#", "'", '"', "\\", "@", ":", "/", "%", "?", ";", " ", "ü", "日", "")
ANY_TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("".join(SPECIAL)), max_size=12)


def mistakes(environment: dict[str, str], env_file: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refusal:
        load(environment, env_file)
    return refusal.value.problems


# --- Defaults


def test_nothing_has_to_be_set() -> None:
    settings = load({})
    assert settings.warnings == ()
    assert settings.broker_url.text() == "redis://redis:6379/0"
    assert settings.result_url.text() == "redis://redis:6379/1"
    assert settings.worker.pool == "prefork"
    assert settings.worker.concurrency is None
    assert (derive_soft_limit(settings.tasks), settings.tasks.time_limit) == (1740, 1800)
    assert settings.broker.visibility_timeout == 3600


def value_of(variable: Variable, environment: dict[str, str]) -> Any:
    return getattr(getattr(load(environment), variable.group), variable.attribute)


@pytest.mark.parametrize("variable", VARIABLES.values(), ids=VARIABLES)
def test_a_default_written_down_is_the_default(variable: Variable) -> None:
    default = value_of(variable, {})
    if isinstance(default, SecretStr):
        assert default.get_secret_value() == ""
    else:
        assert value_of(variable, {variable.name: format_value(default)}) == default


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_that_is_empty_is_not_set(variable: str, tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(f"{variable}=\n")
    assert load({variable: ""}) == load({}, env_file) == load({})


def test_every_variable_is_set_once_and_says_what_it_is() -> None:
    assert len(VARIABLES) == sum(len(group.model_fields) for group in GROUPS.values())
    assert all(group.__doc__ for group in GROUPS.values())
    for variable in VARIABLES.values():
        assert variable.name.isupper()
        assert read_help()[variable.name].endswith(".")
        assert variable.allowed.removeprefix("one of ")


# --- Values


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("CELERY_VISIBILITY_TIMEOUT", "7200", 7200),
        ("BROKER_ALLOW_VOLATILE", "1", True),
        ("BROKER_ALLOW_VOLATILE", "0", False),
        ("CELERY_RESULT_EXPIRES", "60", 60),
        ("CELERY_IMPORTS", "shop.tasks, shop.reports,", ("shop.tasks", "shop.reports")),
        ("CELERY_TIMEZONE", "Europe/Berlin", "Europe/Berlin"),
        ("LOG_LEVEL", "WARNING", "warning"),
        ("WORKER_POOL", "Threads", "threads"),
        ("WORKER_CONCURRENCY", "8", 8),
        ("WORKER_QUEUES", "celery, reports", ("celery", "reports")),
        ("WORKER_AUTOSCALE", "8,2", (8, 2)),
        ("WORKER_AUTOSCALE", "8, 8", (8, 8)),
        ("BEAT_SCHEDULE", "a=off", (("a", "off"),)),
        ("BEAT_SCHEDULE", "a=60; b = 0 3 * * mon ;", (("a", "60"), ("b", "0 3 * * mon"))),
        ("FLOWER_URL_PREFIX", "/flower/", "flower"),
        ("FLOWER_URL_PREFIX", "tools/flower", "tools/flower"),
        ("FLOWER_BIND", "[::1]", "[::1]"),
        ("WORKER_MEMORY", "512M", "512m"),
        ("WORKER_CPUS", "0.5", "0.5"),
        ("WORKERS", "0", 0),
        ("REDIS_IMAGE", "registry:5000/redis:8.0.3@sha256:ab", "registry:5000/redis:8.0.3@sha256:ab"),
    ],
)
def test_a_value_is_read(variable: str, text: str, value: object) -> None:
    assert value_of(VARIABLES[variable], {variable: text}) == value


@pytest.mark.parametrize("login", ["admin:secret", "admin:a:b,c", "admin: ", 'a:"', "ä:ü"])
def test_a_login_may_have_colons_and_commas_in_its_password(login: str) -> None:
    assert load({"FLOWER_BASIC_AUTH": login}).flower.basic_auth.get_secret_value() == login
    assert load({"FLOWER_READ_ONLY_AUTH": login}).flower.read_only_auth.get_secret_value() == login


def test_proxies_are_addresses_and_networks_of_both_kinds() -> None:
    proxies = {"FLOWER_TRUSTED_HEADER": "Remote-User", "FLOWER_TRUSTED_PROXIES": "10.0.0.7, 10.0.1.0/24,::1"}
    flower = load(proxies).flower
    assert flower.trusted_header == "Remote-User"
    assert [str(network) for network in flower.trusted_proxies] == ["10.0.0.7/32", "10.0.1.0/24", "::1/128"]


def test_the_redis_password_goes_into_every_url_that_has_none() -> None:
    settings = load({"REDIS_PASSWORD": "p/w", "CELERY_RESULT_BACKEND": "redis://:own@other/3"})
    assert settings.broker_url.text() == "redis://:p%2Fw@redis:6379/0"
    assert settings.result_url.text() == "redis://:own@other:6379/3"


def test_names_are_read_as_they_are_spelt() -> None:
    assert load({"log_level": "debug", "Worker_Pool": "solo"}) == load({})


# --- Mistakes


@pytest.mark.parametrize("variable", [name for name in VARIABLES if name not in FREE_TEXT])
def test_nonsense_is_refused_by_name_with_what_was_given_and_what_is_allowed(variable: str) -> None:
    (problem,) = mistakes({variable: "?! nonsense"})
    found = "a value that is not shown" if variable in SECRETS else "'?! nonsense'"
    assert problem.startswith(f"{variable}: found {found}")
    assert problem.endswith(f"; allowed: {VARIABLES[variable].allowed}")


@pytest.mark.parametrize(
    "text", ["1h", "3600.5", "3600.0", "0", "-1", " 60", "60 ", "1_000", "+60", "1e3", "٣٦٠٠", "0x10", "true", "60s"]
)
@pytest.mark.parametrize("variable", [name for name in VARIABLES if VARIABLES[name].unit == "seconds"])
def test_seconds_are_whole_and_above_zero(variable: str, text: str) -> None:
    (problem,) = mistakes({variable: text})
    assert problem.startswith(f"{variable}: found {text!r}; allowed: whole seconds")


@pytest.mark.parametrize(
    ("variable", "values"),
    [
        ("CELERY_BROKER_URL", ["redis", "amqp://rabbit", "redis://secret@redis/0", "redis://redis/x"]),
        ("CELERY_RESULT_BACKEND", ["rpc://", "db+sqlite:///x"]),
        ("BROKER_ALLOW_VOLATILE", ["2", "maybe", "-1"]),
        ("CELERY_TIMEZONE", ["Mars", "../UTC", "Europe", ".", "/etc/passwd", "UTC+1"]),
        ("LOG_LEVEL", ["loud", "info\n", "warn", "1"]),
        ("WORKER_PROCESSES", ["0", "65", "1.5"]),
        ("WORKER_POOL", ["gevent", "processes", "prefork,solo"]),
        ("WORKER_CONCURRENCY", ["0", "-2", "1001", "auto"]),
        ("WORKER_QUEUES", [",", "a b", "a;b", "a,--purge=1", "a/b"]),
        ("WORKER_AUTOSCALE", ["8", "2,8", "8,0", "8,2,1", "8;2", "-8,-9"]),
        ("WORKER_MAX_TASKS_PER_CHILD", ["0"]),
        ("WORKER_MAX_MEMORY_PER_CHILD", ["9999", "200m"]),
        ("WORKER_PREFETCH_MULTIPLIER", ["0", "1001"]),
        ("WORKER_HEARTBEAT_TIMEOUT", ["44"]),
        ("BEAT_SCHEDULE", ["nightly", "=60", "a=", "a=0", "a=1.5", "a=never", "a=* * * *", "a=60; b"]),
        ("FLOWER_BASIC_AUTH", ["admin", "admin:", ":secret"]),
        ("FLOWER_READ_ONLY_AUTH", ["guest", "guest:", ":secret"]),
        ("FLOWER_TRUSTED_HEADER", ["X User", "X-User:", "x_user", "-", "Authorization", "cookie", "X-Forwarded-For"]),
        (
            "FLOWER_TRUSTED_PROXIES",
            ["proxy", "*", ",", "10.0.0.7/8", "0.0.0.0/0", "10.0.0.7,::/0", "0.0.0.0/1,128.0.0.0/1", "10.0.0.256"],
        ),
        ("FLOWER_PORT", ["0", "65536", "http"]),
        ("FLOWER_BIND", ["localhost", "0.0.0.0 ", "*", "::1", "[127.0.0.1]", "1", "...", "[::1", "[]"]),
        ("FLOWER_URL_PREFIX", ["a b", "//", "/a//b", "/a?b", "https://host/flower"]),
        ("FLOWER_MAX_TASKS", ["99", "1000001"]),
        ("FLOWER_MAX_WORKERS", ["0", "5001"]),
        ("WORKERS", ["-1", "1001"]),
        ("REDIS_REPLICAS", ["2", "-1"]),
        ("REDIS_MAXMEMORY", ["512", "512mb", "0m", "0.5g", "half"]),
        ("WORKER_MEMORY", ["-1g", "1t", "1 g"]),
        ("WORKER_CPUS", ["-1", "two", ".5", "1,5", "01", "0.005", "0.009"]),
        ("REDIS_IMAGE", ["Redis:8", "redis 8", "-redis"]),
        ("STALK_RUN_DIR", ["run", "/", "/run/"]),
    ],
)
def test_a_value_outside_what_is_allowed_is_refused(variable: str, values: list[str]) -> None:
    for value in values:
        problems = mistakes({variable: value})
        assert [problem.split(":")[0] for problem in problems] == [variable], value


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    wrong = {
        "CELERY_BROKER_URL": "amqp://rabbit",
        "CELERY_VISIBILITY_TIMEOUT": "1h",
        "CELERY_RESULT_EXPIRES": "0",
        "LOG_LEVEL": "loud",
        "WORKER_POOL": "gevent",
        "WORKER_PROCESSES": "none",
        "FLOWER_PORT": "http",
        "WORKERS": "many",
        "BEAT_SCHEDULE": "often",
        "CELERY_TASK_SOFT_TIME_LIMIT": "99999",
        "WORKER_STOP_GRACE_PERIOD": "59",
        "REDIS_MAXMEMORY": "2g",
        "REDIS_PASSWORD_FILE": str(tmp_path / "gone"),
        "BEAT_MEMORY": "512m",
    }
    named = [problem.split(":")[0].split(" ")[0] for problem in mistakes(wrong)]
    assert sorted(named) == sorted(wrong)


@pytest.mark.parametrize(
    "environment",
    [
        {"CELERY_TASK_TIME_LIMIT": "2h", "CELERY_TASK_SOFT_TIME_LIMIT": "6000"},
        {"WORKER_STOP_GRACE_PERIOD": "15m", "WORKER_SOFT_SHUTDOWN": "600"},
        {"WORKER_POOL": "fork", "WORKER_AUTOSCALE": "4,1"},
        {"REDIS_MEMORY": "4 GB", "REDIS_MAXMEMORY": "2g"},
        {"CELERY_SENTINEL_MASTER": "", "CELERY_BROKER_URL": "sentinel://s1/x"},
    ],
)
def test_a_mistake_is_not_reported_as_a_contradiction_too(environment: dict[str, str]) -> None:
    assert len(mistakes(environment)) == 1


@pytest.mark.parametrize("variable", REMOVED_LIMITS)
def test_a_variable_that_was_removed_is_refused_with_the_line_that_takes_its_place(
    variable: str, tmp_path: Path
) -> None:
    (problem,) = mistakes({variable: "96"})
    (tmp_path / ".env").write_text(f"{variable}=96\n")
    assert mistakes({}, tmp_path / ".env") == (problem,)
    assert problem.startswith(f"{variable} is no longer a variable: ")
    written = yaml.safe_load(problem.partition("compose.override.yaml: ")[2])
    shipped = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    service, limit = variable.lower().split("_")
    assert written == {"services": {service: {"deploy": {"resources": {"limits": {limit: 96}}}}}}
    # A value of its own, which the line replaces.
    assert "$" not in str(shipped["services"][service]["deploy"]["resources"]["limits"][limit])


# --- Combinations


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"CELERY_TASK_SOFT_TIME_LIMIT": "1800"},
            "CELERY_TASK_SOFT_TIME_LIMIT (1800 s) must be below CELERY_TASK_TIME_LIMIT (1800 s), ",
        ),
        (
            {"WORKER_SOFT_SHUTDOWN": "46"},
            "WORKER_STOP_GRACE_PERIOD (60 s) must be 61 or more, because WORKER_SOFT_SHUTDOWN is 46 s ",
        ),
        ({"WORKER_STOP_GRACE_PERIOD": "59"}, "WORKER_STOP_GRACE_PERIOD (59 s) must be 60 or more, "),
        (
            {"WORKER_AUTOSCALE": "4,1", "WORKER_POOL": "threads"},
            "WORKER_AUTOSCALE needs WORKER_POOL=prefork; the threads pool ",
        ),
        (
            {"WORKER_AUTOSCALE": "4,1", "WORKER_CONCURRENCY": "2"},
            "WORKER_AUTOSCALE and WORKER_CONCURRENCY are both set: ",
        ),
        (
            {"WORKER_POOL": "solo", "WORKER_CONCURRENCY": "2"},
            "WORKER_CONCURRENCY is 2, but the solo pool runs one task at a time: use WORKER_PROCESSES, or another "
            "WORKER_POOL",
        ),
        *(
            ({url: "sentinel://s1/0"}, f"CELERY_SENTINEL_MASTER must name the master, because {url} is ")
            for url in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND")
        ),
        # A quarter more is 1025 MB.
        (
            {"REDIS_MAXMEMORY": "820m"},
            "REDIS_MAXMEMORY (820m) and the quarter more that workers may use when Redis is full must be below "
            "REDIS_MEMORY (1g), ",
        ),
        ({"REDIS_MEMORY": "655360k"}, "REDIS_MAXMEMORY (512m) and the quarter more "),
        (
            {"FLOWER_BASIC_AUTH": f"admin:{MARK}", "FLOWER_READ_ONLY_AUTH": f"admin:another-{MARK}"},
            "FLOWER_READ_ONLY_AUTH has the user of FLOWER_BASIC_AUTH: give it another user",
        ),
        ({"FLOWER_TRUSTED_HEADER": "Remote-User"}, "FLOWER_TRUSTED_HEADER needs FLOWER_TRUSTED_PROXIES, "),
        ({"FLOWER_TRUSTED_PROXIES": "10.0.0.7"}, "FLOWER_TRUSTED_PROXIES needs FLOWER_TRUSTED_HEADER: "),
    ],
)
def test_settings_that_contradict_each_other_are_refused(environment: dict[str, str], says: str) -> None:
    (problem,) = mistakes(environment)
    assert problem.startswith(says)
    assert MARK not in problem


@pytest.mark.parametrize(
    "environment",
    [
        {"CELERY_TASK_SOFT_TIME_LIMIT": "1799"},
        {"CELERY_VISIBILITY_TIMEOUT": "60", "CELERY_TASK_TIME_LIMIT": "86400"},
        {"WORKER_SOFT_SHUTDOWN": "600", "WORKER_STOP_GRACE_PERIOD": "615"},
        {"WORKER_AUTOSCALE": "4,1"},
        {"FLOWER_BASIC_AUTH": "admin:secret", "FLOWER_READ_ONLY_AUTH": "adm:secret"},
        {"CELERY_BROKER_URL": "sentinel://s1/0", "CELERY_SENTINEL_MASTER": "main"},
        {"REDIS_MAXMEMORY": "819m"},
        {"REDIS_MAXMEMORY": "2g", "REDIS_REPLICAS": "0"},
        {"REDIS_MAXMEMORY": "2g", "STALK_RUNTIME": "local"},
        {"CELERY_BROKER_URL": "redis://redis:6379/0", "CELERY_RESULT_BACKEND": "redis://redis:6379/1"},
        {"CELERY_BROKER_URL": "redis://redis:6379/0", "CELERY_RESULT_BACKEND": "redis://other:6379/0"},
        {"CELERY_BROKER_URL": "redis+socket:///a", "CELERY_RESULT_BACKEND": "redis+socket:///b"},
    ],
)
def test_settings_that_just_fit_are_accepted_without_a_warning(environment: dict[str, str]) -> None:
    assert load(environment).warnings == ()


SAME_DATABASE = "CELERY_BROKER_URL and CELERY_RESULT_BACKEND name the same database (0): "
NO_LIMITS = " cannot enforce CELERY_TASK_TIME_LIMIT and CELERY_TASK_SOFT_TIME_LIMIT: "


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CELERY_RESULT_BACKEND": "redis://redis:6379/0"}, SAME_DATABASE),
        (
            {"CELERY_BROKER_URL": "redis+socket:///s", "CELERY_RESULT_BACKEND": "redis+socket:///s?virtual_host=0"},
            SAME_DATABASE,
        ),
        ({"WORKER_POOL": "threads"}, f"WORKER_POOL=threads{NO_LIMITS}"),
        ({"WORKER_POOL": "solo"}, f"WORKER_POOL=solo{NO_LIMITS}"),
    ],
)
def test_what_works_but_should_be_known_is_a_warning(environment: dict[str, str], says: str) -> None:
    (warning,) = load(environment).warnings
    assert warning.startswith(says)


def test_limits_of_prefork_children_are_warned_about_in_other_pools() -> None:
    limits = {"WORKER_MAX_TASKS_PER_CHILD": "100", "WORKER_MAX_MEMORY_PER_CHILD": "200000"}
    assert load(limits).warnings == ()
    warnings = load(limits | {"WORKER_POOL": "threads"}).warnings
    assert "WORKER_MAX_TASKS_PER_CHILD and WORKER_MAX_MEMORY_PER_CHILD only work with WORKER_POOL=prefork" in warnings


# --- .env


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("WORKER_CONCURENCY=4", "did you mean WORKER_CONCURRENCY?"),
        ("CELERY_BROKER=redis://redis/0", "did you mean CELERY_BROKER_URL?"),
        ("LOG_LEVEL_FILE=/run/level", "did you mean LOG_LEVEL?"),
        ("SHOP_URL=https://shop.example.com", "variables for your own tasks belong in .env.tasks"),
    ],
)
def test_a_variable_that_nobody_reads_is_warned_about(tmp_path: Path, line: str, hint: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(line + "\n")
    (warning,) = load({}, env_file).warnings
    assert warning == f"{line.partition('=')[0]} in .env is read by nothing in Stalk: {hint}"


def test_only_what_stands_in_the_file_is_warned_about(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    (tmp_path / "password").write_text("secret")
    env_file.write_text(f"COMPOSE_PROJECT_NAME=shop\nREDIS_PASSWORD_FILE={tmp_path / 'password'}\nWORKERS=2\n")
    assert load({"SHOP_URL": "https://shop.example.com", "HOME": "/root"}, env_file).warnings == ()


def test_a_process_reads_its_environment_and_the_file_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    (tmp_path / ".env").write_text("REDIS_PASSWORD='from $ file'\nLOG_LEVEL=error\nWORKER_POOL=solo\n")
    monkeypatch.setattr("config.loading.ENV_FILE", tmp_path / ".env")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://redis/5")
    monkeypatch.setenv("CELERY_BROKER_READ_URL", "redis://elsewhere/0")
    # Both as Compose passes on what is not set. With a value, a child would find a result backend beside its file.
    monkeypatch.setenv("WORKER_POOL", "")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "")
    settings = load()
    assert (settings.tasks.log_level, settings.worker.pool) == ("debug", "prefork")
    assert settings.broker_url.text() == "redis://:from%20%24%20file@redis:6379/5"
    # Celery prefers these two to its configuration, so they have to agree with it.
    assert os.environ["CELERY_BROKER_URL"] == os.environ["CELERY_BROKER_READ_URL"] == settings.broker_url.text()
    assert "CELERY_BROKER_WRITE_URL" not in os.environ
    assert os.environ["CELERY_RESULT_BACKEND"] == ""
    # What a child reads is the same again.
    assert (load().broker_url, load().result_url) == (settings.broker_url, settings.result_url)


# --- Secrets


@pytest.mark.parametrize("variable", SECRETS)
def test_every_secret_comes_from_a_file_as_well(tmp_path: Path, variable: str) -> None:
    value = "redis://:a%40b@host:7000/2" if "URL" in variable or "BACKEND" in variable else "user:pa$$w#rd"
    path = tmp_path / "secret"
    path.write_text(value + "\n")
    assert load({f"{variable}_FILE": str(path)}) == load({variable: value}) != load({})
    assert mistakes({f"{variable}_FILE": str(path), variable: value}) == (
        f"{variable} and {variable}_FILE are both set: keep one of them",
    )


def test_what_can_carry_a_password_is_a_secret() -> None:
    assert set(SECRETS) == build_secrets().keys()


def assert_hidden(text: str) -> None:
    assert MARK not in text
    assert quote(MARK) not in text


@given(st.tuples(ANY_TEXT, ANY_TEXT))
@example(("".join(SPECIAL), "".join(SPECIAL)))
def test_no_secret_is_shown_where_the_configuration_is_good(around: tuple[str, str]) -> None:
    settings = load(build_secrets(MARK.join(around)))
    groups = [getattr(settings, name) for name in GROUPS]
    for text in (repr(settings), str(settings), render_settings(settings), *map(repr, groups), *map(str, groups)):
        assert_hidden(text)
    assert MARK in settings.broker_url.password


@given(st.tuples(ANY_TEXT, ANY_TEXT))
@example(("".join(SPECIAL), "".join(SPECIAL)))
def test_no_secret_is_shown_where_something_else_is_wrong(around: tuple[str, str]) -> None:
    environment = build_secrets(MARK.join(around)) | {"LOG_LEVEL": "loud", "WORKER_SOFT_SHUTDOWN": "600"}
    environment |= {"CELERY_VISIBILITY_TIMEOUT": "1h", "FLOWER_PORT": "http", "CELERY_RESULT_EXPIRES": "never"}
    with pytest.raises(ConfigError) as refusal:
        load(environment)
    assert len(refusal.value.problems) == 5
    assert_hidden("".join(traceback.format_exception(refusal.value)))


@given(before=ANY_TEXT, after=ANY_TEXT)
@example("redis://:", "@redis/x")
@example("redis://:", "/@redis/0")
@example("redis://", "@redis/0")
@example("redis://:x@redis:", "/0")
@example("rediss://:", "@redis/0?ssl_cert_reqs=x")
@example("sentinel://", "")
def test_no_secret_is_shown_where_it_is_itself_wrong(before: str, after: str) -> None:
    wrong = f"{before}{MARK}{after}"
    # Neither a URL nor a login, whatever was drawn.
    login = wrong.replace(":", ";")
    problems = mistakes({"CELERY_BROKER_URL": wrong, "CELERY_RESULT_BACKEND": wrong, "FLOWER_BASIC_AUTH": login})
    assert any(problem.startswith("FLOWER_BASIC_AUTH") for problem in problems)
    for problem in problems:
        assert_hidden(problem)


# --- Frozen


@pytest.mark.parametrize("group", GROUPS)
def test_no_setting_can_be_changed_and_the_refusal_shows_no_secret(group: str) -> None:
    settings = load(build_secrets())
    values = getattr(settings, group)
    for attribute in GROUPS[group].model_fields:
        with pytest.raises(ValidationError, match="frozen") as refusal:
            setattr(values, attribute, None)
        assert_hidden(str(refusal.value))
    with pytest.raises(FrozenInstanceError):
        setattr(settings, group, values)
    with pytest.raises(FrozenInstanceError):
        settings.broker_url.password = "another"  # type: ignore[misc]
