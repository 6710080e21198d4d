"""The command line: click commands, one file a verb. Nothing here imports torch before a command runs."""
