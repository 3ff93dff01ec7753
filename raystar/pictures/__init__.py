"""Between latents and pictures: codecs, the built-in decoder, grids."""
