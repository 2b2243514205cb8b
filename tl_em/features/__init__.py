"""Sparse features: dictionaries trained, latents scored, shared ones found or not, and verified causally."""
