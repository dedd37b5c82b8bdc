"""Single Serve deployments on a plain Ray. A package, so that its Ray ends with it."""
