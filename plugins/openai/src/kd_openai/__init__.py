"""Text teachers behind an OpenAI-compatible server."""
