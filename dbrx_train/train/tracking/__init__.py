"""What is kept of a run: MLflow, events, goodput."""
