"""The processes of a run, and what they must agree on.

There is one process for now; nothing else here may assume so.
"""
