"""The data mix over a run."""
