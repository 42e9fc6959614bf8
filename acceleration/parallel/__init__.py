"""Image parallelism: the images of a batch, or of a prompt, spread over the processes of a group."""
