"""What learns: an architecture, a quantiser and an adapter of a Hugging Face causal model, on one rank or in shards.

May import losses, data, batch and settings. Open `student.py` first: what the loop knows of it; then `load.py`.
"""
