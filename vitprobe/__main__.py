"""`vitprobe` and `python -m vitprobe`."""

import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C is heard while it is imported too."""
    try:
        from vitprobe import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
