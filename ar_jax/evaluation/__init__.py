"""Evaluation: likelihoods, pictures, and how good samples are."""
