"""The commands of `stillhouse-train` beside training, and how settings are composed of YAML and overrides.

May import everything but `main.py`, which alone imports it. Open `compose.py` first.
"""
