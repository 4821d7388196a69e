"""How gradients become updates: AdamW, Muon with QK-clip, their groups and schedules.

Read `optimizer.py` first.
"""
