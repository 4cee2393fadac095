"""The run: RunConfig -> composer.Trainer. The only room that imports composer."""
