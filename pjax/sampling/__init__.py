"""Sampling: logits and rows of parameters in, tokens and log-probabilities out. It knows neither models nor requests."""
