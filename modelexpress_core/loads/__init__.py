"""One attempt to load from one candidate: from a checkpoint, or from the memory of a peer."""
