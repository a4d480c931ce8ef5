"""A trained judge in use: the Judge class, grades, JSON lines, prometheus-eval's names.

Nothing here trains.
"""
