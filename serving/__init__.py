"""`dsvl serve`: a checkpoint behind the OpenAI chat-completions protocol.

The protocol's answers are made by transformers' own server (`transformers.cli.serving`); here is what it lacks: batches,
limits, requests that end with their client, and nothing that a request could reach but the model.
"""
