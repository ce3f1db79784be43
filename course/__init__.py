"""Exercises from the one source: see EXERCISES.md, and for teachers `python -m course --help`."""
