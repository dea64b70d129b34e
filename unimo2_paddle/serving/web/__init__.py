"""The web page: static files that ``unimo2 serve`` hands out at ``/``, and what they ask for."""
