"""Who gets in, and whose turn it is: permits, fair queueing by tokens, one computation for all who ask the same.

May import the contract. Open `coalescer.py` first, then `admission.py`.
"""
