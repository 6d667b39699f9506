"""Which worker holds which model: identities, publishing, discoveries, ranking, and clients of servers and workers."""
