"""HTTP: connections, body limits, keys, TLS, routes that every service has, errors by one table.

May import `scheduling` and the contract. Open `routes.py` first.
"""
