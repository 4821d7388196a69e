"""A trained student in the formats of those who run it: Hugging Face, BitNet, GGUF.

Imports students and checkpoints. Read `export.py` first.
"""
