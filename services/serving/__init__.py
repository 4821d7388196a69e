"""The common base of both services: request ids, body limits, keys, admission, fair queueing, metrics, draining.

`teacher_service` and `attention_service` build on it; it imports neither of them, and no engine.
"""
