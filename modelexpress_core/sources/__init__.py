"""Which workers hold a model: identities, publishing, discovery and ranking."""
