"""Demo data: procedurally painted pictures in five styles, and the latents of those pictures.

Nothing in this package needs torch or diffusers, except `python -m raystar.demo --encode`.
"""

from pathlib import Path

__all__ = ["DOMAINS", "latents_path", "thumbnails_path"]

DOMAINS = ("photo", "pointillism", "woodcut", "watercolour", "stained_glass")
"""The domains, in the order that the painter numbers them."""


def latents_path() -> Path:
    """Return the path of the shipped `latents.safetensors`: one fp16 tensor [96, 4, 32, 32] a domain."""
    return Path(__file__).with_name("latents.safetensors")


def thumbnails_path() -> Path:
    """Return the path of the shipped `thumbnails.png`: 8x8 pixels a picture, domains in rows."""
    return Path(__file__).with_name("thumbnails.png")
