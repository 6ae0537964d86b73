"""python -m services.supervisor.supervise: run supervisord; exit code 0 it was told to stop, 1 a node could not start.

supervisord itself exits with 0 in both cases, and stays when all its programs have failed (supervisor 4.3).
"""

import sys

from supervisor import supervisord

from services.supervisor import watchdog


def main() -> None:
    """Run supervisord in this process with the command line that was given."""
    supervisord.main(sys.argv[1:])
    sys.exit(1 if watchdog.failed_programs else 0)


if __name__ == "__main__":
    main()
