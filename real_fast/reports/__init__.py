"""What people look at: figures, the HTML page, the summary, what a run prints.

It takes values and draws them; nothing here computes a training step or samples.
"""
