"""Hugging Face: what its classes call our tensors, and its files."""
