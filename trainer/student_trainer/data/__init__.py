"""From sources to packed batches: documents, tokens, rows, and the mixture with the policies that decide its weights.

May import settings and batch. Open `loader.py` first: batch n from (settings, mixture state, n); `stream.py` prepares
batches ahead on a thread.
"""
