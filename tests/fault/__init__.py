"""Processes that die, hang, lie and are replaced while people ask. A package, so that its Ray ends with it."""
