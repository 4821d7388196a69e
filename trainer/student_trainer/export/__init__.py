"""A trained student in the formats of those who run it: Hugging Face, BitNet, GGUF.

May import students and what lies below them. Open `export.py` first.
"""
