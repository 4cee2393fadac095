"""What is in a corpus: samples of it, duplicates, a map with clusters, and a page to look at."""
