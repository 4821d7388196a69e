"""The contract between a teacher and its students, and the client that speaks it.

Services, trainer and anybody else's trainer import it; it imports none of them, and never torch at import.
The wire is specified in WIRE.md beside this file.
"""
