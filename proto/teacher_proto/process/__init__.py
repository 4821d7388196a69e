"""What every command does as a process: signals, stages said as they go, children ended, a parent watched.

Imports nothing else of the contract. Open `stopping.py` first.
"""
