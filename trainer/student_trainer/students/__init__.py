"""The model that learns: a Hugging Face causal model with an architecture, a quantiser and an adapter, sharded or not.

May import losses, data, batch and settings. Open `student.py` first, which is the loop's interface; then `load.py`.
"""
