"""The web page of `dsvl demo`, which is also a Hugging Face Space."""
