"""Autoencoders and encoders between images and latents."""
