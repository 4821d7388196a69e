"""The clients of the teacher and attention services: replicas, retries, deadlines, progress, identity checks.

May import `wire` and the records. Open `teacher_client.py` first, then `replica_client.py`.
"""
