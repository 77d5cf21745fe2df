"""The command ``loki``: parsing and printing only. Each command's module imports torch when it runs, not before."""

from loki_attention.cli.app import app, main

__all__ = ["app", "main"]
