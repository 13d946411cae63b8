"""Ways in and out of other libraries and of the disk; each imports what it needs when it is called."""
