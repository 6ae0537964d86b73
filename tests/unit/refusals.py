"""Commands that refuse to start: exit code 2, and sentences where a traceback would be."""

from tests.support.checkout import Checkout


def run_refused(checkout: Checkout, *arguments: str, **environment: str) -> list[str]:
    """Run Python with these arguments, which it must refuse, and return the lines on standard error."""
    done = checkout.run(*arguments, **environment)
    assert done.returncode == 2, done
    # Celery's beat says that it starts before it reads its configuration.
    assert done.stdout == "" or done.stdout.startswith("celery beat v"), done
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()
