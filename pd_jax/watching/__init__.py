"""What can be watched: the figures of a run while it goes on, and where attention goes. Each file by its own name."""
