"""Groups of subcommands of the command line, a file each; nothing heavy is imported at the top."""
