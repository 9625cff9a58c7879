"""RICE in use: the `rice` command line and what it runs."""
