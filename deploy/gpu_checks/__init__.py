"""Checks that everything works on a machine with one GPU, and how fast. Run by `deploy/gpu_check`; read `__main__`."""
