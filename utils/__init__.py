"""What commands and packages share; nothing here imports torch or transformers before it is called."""
