"""Publishing a checkpoint on the Hub: checks, loading in a fresh process, and upload in one commit."""
