"""A configuration with a secret in every place that can hold one, for tests of what must not show it."""

from urllib.parse import quote

# Distinct enough not to turn up by chance in what must not contain it.
MARK = "Zq7-s3cret"


def build_secrets(password: str = MARK) -> dict[str, str]:
    """An environment with `password` in every place."""
    encoded = quote(password, safe="")
    return {
        "CELERY_BROKER_URL": f"redis://user:{encoded}@redis/0",
        "CELERY_RESULT_BACKEND": f"redis+socket://:{encoded}@/run/redis.sock",
        "REDIS_PASSWORD": password,
        "CELERY_SENTINEL_PASSWORD": password,
        "FLOWER_BASIC_AUTH": f"admin:{password}",
        "FLOWER_READ_ONLY_AUTH": f"guest:{password}",
    }
