"""Samples of the mix as a data set, read from shards."""
