"""HTTP: connections, body limits, keys, TLS, the routes that every service has, and one table of errors.

May import `scheduling` and the contract. Open `routes.py` first.
"""
