"""Load and measurements over HTTP; speaks to any OpenAI-compatible server."""
