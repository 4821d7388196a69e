"""How gradients become updates: AdamW, Muon with QK-clip, their groups and schedules.

May import students and what lies below them. Open `optimizer.py` first.
"""
