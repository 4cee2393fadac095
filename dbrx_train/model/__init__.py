"""What is trained: a DBRX-style decoder. torch only; imports nothing else of the project."""
