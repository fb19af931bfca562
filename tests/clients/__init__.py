"""Real clients against one running server."""
