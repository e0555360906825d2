"""Evaluation: likelihoods and pictures."""
