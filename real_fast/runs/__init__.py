"""A run on disk: its folder, checkpoints, log, trackers, and stopping without losing anything.

Nothing here knows what is trained or how; it is handed values and writes them.
"""
