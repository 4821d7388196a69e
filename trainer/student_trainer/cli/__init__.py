"""The commands of `stillhouse-train` beside training, and how settings are composed of YAML and overrides.

Imports everything else; nothing but `main` imports it. Read `compose.py` first.
"""
