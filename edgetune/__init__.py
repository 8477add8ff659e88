"""The command line: what ties client, coordinator and experiments together."""
