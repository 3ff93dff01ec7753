"""Latents: found, read, packed, held out, and handed over in batches."""
