"""Compression: fewer channels, heads, blocks and ranks, with the dense network as the teacher."""
