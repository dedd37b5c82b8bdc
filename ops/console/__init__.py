"""The web console's server side: what the page shows and how it signs in. The page itself is in static/.

ops/api_server.py listens and routes; what is here knows nothing of HTTP but for assets.py (the page's files) and
chat.py (the test chat). static/vendor/ holds the page's two libraries, unchanged; vendor.json records versions,
hashes and licences.
"""
