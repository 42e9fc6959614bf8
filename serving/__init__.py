"""`dsvl serve`: a checkpoint behind the OpenAI chat-completions API.

Responses are formatted by the server of transformers (`transformers.cli.serving`). This package adds batching, limits and
cancellation when a client disconnects, and ignores everything in a request that could access more than the model.
"""
