"""Computes records from hidden states and logits, for every engine. The only part of the contract that needs torch.

May import the records and `hardware`. Open `reduction.py` first.
"""
