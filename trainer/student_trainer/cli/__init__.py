"""The commands of `stillhouse-train` other than training, and how settings are composed of YAML and overrides.

May import everything but `main.py`, the only module that imports it. Open `compose.py` first.
"""
