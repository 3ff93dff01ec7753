"""A trained model as MLflow serves it: a picture or a latent and a domain in, a picture out.

`mlflow models predict -m models:/NAME@champion` and `mlflow.pyfunc.load_model` use it; a model in the store holds an
export folder and the name of this class.

Columns of a request, one translation a row: `picture` (PNG, JPEG or the like as base64) or `latent` (unscaled
[4,H,W] as nested lists); `domain`; to take a style from, `reference` (a picture) or `reference_latent`, else a noise.
Parameters: `seed` of the noise, 0 by default; `latents`, whether latents are wanted as well. Answer: `picture`, PNG as
base64, and `latent` if wanted.

Pictures need a VAE, to become latents: `model_config={"vae": ...}` of `mlflow.pyfunc.load_model`, the environment
variable RAYSTAR_VAE, the one that the model's configuration names, or Stable Diffusion 1.5's from the hub.
"""

from __future__ import annotations

from raystar.exported.serving import VAE_VARIABLE, StyleModel

__all__ = ["VAE_VARIABLE", "StyleModel"]
