"""What people use to run Switchyard: the command line, later the console, metrics and benchmarks.

May import ``cluster`` and what ``deployments`` offers publicly; nothing imports ``ops``.
"""
