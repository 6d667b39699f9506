"""Who has a model: identities, servers that know, and workers that tell them."""
