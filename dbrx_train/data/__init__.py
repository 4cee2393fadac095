"""What it is trained on: tokenizer, shards, and the mix of sources over the run."""
