"""Images that are computed once: where their keys and values are kept, and the prefill of a prompt's text over them."""
