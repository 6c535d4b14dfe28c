"""Training data: image folders, latent shards, tokens, batches."""
