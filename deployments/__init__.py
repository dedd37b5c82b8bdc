"""Ray Serve: the actors that place, watch and restart what ``model`` and ``cluster`` provide.

Lives here: the engine, expert worker and expert router deployments, and ``app.build_app``, which
puts them together. They are thin: what can be decided in a pure function is decided in ``cluster``,
what is computed is computed in ``model``. May not live here: arithmetic on tensors, the bytes of
the data plane, and anything a command line needs (``ops``).
"""
