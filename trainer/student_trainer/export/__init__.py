"""Exports a trained student for other software: Hugging Face, BitNet, GGUF and other formats.

May import students and what lies below them. Open `export.py` first.
"""
