"""Evaluating a judge on rows with labels: predictions, correlations, calibration, intervals.

It samples through an engine and returns numbers; figures and pages are made in reports/.
"""
