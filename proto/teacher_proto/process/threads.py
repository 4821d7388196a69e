"""How long a waiting OpenMP thread spins before it sleeps. Called by every command's `main`, before torch is imported.

torch computes with libgomp on Linux. A thread that waits for its next piece of work spins there 300,000 times, which
takes the core away from any other process: two trainers on the same cores, or a trainer and its teacher, become several
times slower. Not spinning at all costs a process that has the cores to itself more than spinning briefly does.
"""

from __future__ import annotations

import os

# Measured by `benchmarks/spinning.py`.
SPINS = 3000
CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_briefly() -> None:
    """Set GOMP_SPINCOUNT for this process and its children, unless the environment chooses how to wait."""
    if not any(os.environ.get(name) for name in CHOSEN_BY):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
