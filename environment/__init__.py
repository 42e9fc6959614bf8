"""`dsvl env`: versions, devices, and which attention runs where, for bug reports."""
