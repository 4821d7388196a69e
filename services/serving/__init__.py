"""What both services stand on: request ids, body limits, keys, admission, fair queueing, metrics, draining.

`teacher_service` and `attention_service` build on it; it knows neither of them, and no engine.
"""
