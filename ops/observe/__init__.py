"""What is made from the catalogue of metrics (cluster/catalogue.py): documentation, dashboards, alerts, runbooks.

`python -m ops.observe` writes all of it again; what it has written is committed, and a test compares.
"""
