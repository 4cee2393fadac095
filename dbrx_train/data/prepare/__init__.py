"""From text, JSON lines, Parquet and conversations to MDS shards."""
