"""The command line, `fastdet`."""
