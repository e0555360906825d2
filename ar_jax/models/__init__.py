"""Models: how mixers are stacked. A new backbone is one file and a line in this table."""

from ar_jax.models.decoder_only import decoder_only

MODELS = {"decoder": decoder_only}
