"""The clients of teacher and attention service: replicas, retries, deadlines, progress, checks of who answers.

May import `wire` and the records. Open `teacher_client.py` first, then `replica_client.py`.
"""
