"""Mixture policies: who decides, from what a run's updates say, how much each source gives.

    update n -> policy.observe(n, losses) -> policy.weights(n) -> batch n + lag is drawn by them

May import settings, ranks, and of `data` the mixture. Open `policy.py` first: what a policy is. `decisions.py` has them
by name, and takes what they decide from the loop to the thread that makes batches.
"""
