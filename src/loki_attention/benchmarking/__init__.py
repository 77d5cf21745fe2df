"""Timing with its conditions: what ran, on what, with which versions."""
