"""What is computed.

Lives here: the vLLM plugin, the engine's RemoteExperts, the worker's HostedExperts, the Grok model, the demo model.
May import vLLM, torch and cluster's data plane. May not import Ray: where things run is decided elsewhere.
"""
