"""Mixture policies, which set the weights of the sources from the metrics of a run's updates.

    update n -> policy.observe(n, losses) -> policy.weights(n) -> batch n + lag is drawn with these weights

May import settings, ranks, and `data.mixture`. Open `policy.py` first: it says what a policy is. `decisions.py` lists
the policies by name, and passes their decisions from the loop to the thread that makes batches.
"""
