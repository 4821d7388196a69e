"""From sources to packed batches: documents, tokens, rows, and the mixture with the policies that decide its weights.

May import settings and batch. Open `loader.py` first: batch n out of (settings, mixture state, n); `stream.py` makes
them ahead on a thread.
"""
