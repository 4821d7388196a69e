"""Hidden states and logits -> records: the one definition that every engine uses. The only part that needs torch.

May import the records and `hardware`. Open `reduction.py` first.
"""
