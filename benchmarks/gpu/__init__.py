"""What ``make gpu-check`` runs, a stage or two in each file; benchmarks/gpu_check.py has their order."""
