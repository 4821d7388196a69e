"""The contract between a teacher and its students: records, wire format and client.

The services, the trainer and third-party trainers import it. It imports none of them, and importing it does not import
torch. The wire format is specified in WIRE.md beside this file.
"""
