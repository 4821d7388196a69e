"""What every command needs as a process: signal handling, progress on the terminal, ending children, parent watching.

Imports nothing else of the contract but `client.waiting`. Open `stopping.py` first.
"""
