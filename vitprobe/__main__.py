"""`python -m vitprobe`."""

from vitprobe.cli import main

main()
