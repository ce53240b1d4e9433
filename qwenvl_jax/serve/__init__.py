"""An HTTP server with OpenAI's API on the engine."""
