"""The proto files of the wire protocol, and the modules generated from them."""
