"""HTTP, as a user talks it. A package, so that its Ray ends with it."""
