"""Data of training: folders of images, shards of latents, tokens, batches."""
