"""What learns: Hugging Face causal models, plain or ternary, whole or in shards.

Read `student.py` first.
"""
