"""Sampling: one compiled loop for every order, its guidance, and exact likelihoods."""
