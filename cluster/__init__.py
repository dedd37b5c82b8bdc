"""Where it runs and how tokens move.

What lives here: the data plane (wire format, transports, expert server, dispatcher, table feed), the routing table and
the pure decisions about placement. These modules import the standard library, numpy and torch at most, and
cryptography to make a certificate (cluster/tls.py).
Ray appears only in modules of this package that ask Ray for nodes and placement. What may not live here: vLLM, model
code, HTTP. Nothing is re-exported: import the module that owns the name.
"""
