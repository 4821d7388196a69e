"""Does everything work on a box with one GPU, and how fast? What `deploy/gpu_check` runs; read `__main__` first."""
