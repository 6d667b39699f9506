"""What the server answers, a module for each service or two."""
