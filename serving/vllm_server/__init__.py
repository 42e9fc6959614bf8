"""`dsvl serve --engine vllm`: vLLM's server with the limits and refusals of the built-in one.

The command builds vLLM's arguments and replaces itself by vLLM's server, which imports `middleware.py`.
"""
