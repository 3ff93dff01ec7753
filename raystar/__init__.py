"""raystar: hyper-parameter search for a latent-space StarGAN v2."""

__version__ = "0.1.0"
