"""How good a model is, on one host: weights in any form, no Trainer."""
