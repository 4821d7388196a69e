"""Targets without a server: the commands `stillhouse-teacher fill`, `pack` and `dataset`.

Open `fill_command.py` first. `fill.py` fills a target store, `dataset_fill.py` a target dataset. Imports the service's
engines and settings; `main.py` alone imports it.
"""
