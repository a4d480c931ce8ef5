"""Small helpers that every folder may use: JSON files, the machine, seeds.

Nothing here knows of judges or models.
"""
