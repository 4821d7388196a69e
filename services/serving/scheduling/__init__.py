"""Admission and scheduling: permits, fair queueing by tokens, and coalescing of identical queries.

May import the contract. Open `coalescer.py` first, then `admission.py`.
"""
