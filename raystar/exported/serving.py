"""The model that MLflow serves."""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel
from PIL import Image
from torch import Tensor

from raystar.base.errors import RaystarError
from raystar.exported import model
from raystar.exported.picture_translator import PictureTranslator
from raystar.pictures.autoencoders import DEFAULT_VAE, SUBFOLDER, open_vae
from raystar.pictures.codec import need_codec
from raystar.pictures.reading import FORMATS, upright

VAE_VARIABLE = "RAYSTAR_VAE"
"""Environment variable that names a VAE: a folder or a hub name."""


class StyleModel(PythonModel):  # type: ignore[misc]
    """An export behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Opens the export; the VAE is opened when it is needed first."""
        self.model = model.load(context.artifacts["export"])
        self._asked = (context.model_config or {}).get("vae")

    def predict(self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Translates every row of a table.

        Args:
            model_input: a data frame with the columns that the module's docstring names.
            params: `seed` and `latents`.

        Returns:
            A data frame with as many rows.

        Raises:
            RaystarError: what is wrong in which row, or pictures without a VAE.
        """
        options = params or {}
        seed, latents = int(options.get("seed", 0)), bool(options.get("latents", False))
        answers = []
        for number, row in enumerate(model_input.to_dict("records")):
            try:
                answers.append(self._translate({key: v for key, v in row.items() if _given(v)}, seed, latents))
            except (RaystarError, ValueError) as error:
                raise RaystarError(f"row {number}: {error}") from None
        return pd.DataFrame(answers)

    def _translate(self, row: Mapping[str, Any], seed: int, latents: bool) -> dict[str, Any]:
        domain = row.get("domain")
        if not isinstance(domain, str):
            raise RaystarError(f"domain: expected one of {', '.join(self.model.domains)}")
        if ("picture" in row) == ("latent" in row):
            raise RaystarError("expected either a picture or a latent")
        if "reference" in row and "reference_latent" in row:
            raise RaystarError("expected at most one of reference and reference_latent")
        style = _latent(row["reference_latent"], "reference_latent") if "reference_latent" in row else None
        if "reference" in row:
            style = self._pictures.encode_reference(_picture(row["reference"], "reference"))
        chosen = None if style is not None else seed
        if "latent" in row:
            latent = self._latents.restyle(_latent(row["latent"], "latent"), domain, style, chosen)
            picture = self._latents.decode(latent)
        else:
            source = _picture(row["picture"], "picture")
            latent = self._pictures.restyle(self._pictures.encode(source), domain, style, chosen)
            picture = self._pictures.decode(latent, source)
        png = io.BytesIO()
        picture.save(png, "PNG")
        answer: dict[str, Any] = {"picture": base64.b64encode(png.getvalue()).decode()}
        return answer | ({"latent": latent[0].tolist()} if latents else {})

    @functools.cached_property
    def _pictures(self) -> PictureTranslator:
        """For pictures, which a VAE makes latents of."""
        asked = self._asked or os.environ.get(VAE_VARIABLE)
        shown = self.model.config.visualization
        name = asked or shown.vae_model_name_or_path or DEFAULT_VAE
        subfolder = SUBFOLDER if asked or shown.vae_model_name_or_path is None else shown.vae_subfolder
        key = "model_config vae" if self._asked else VAE_VARIABLE
        channels = self.model.config.model.latent_channels
        return PictureTranslator(self.model, open_vae(name, self.model.device, key, subfolder, channels))

    @functools.cached_property
    def _latents(self) -> PictureTranslator:
        """For latents, which need no VAE: results are shown as the grids of training are, unless one was asked for."""
        if self._asked or os.environ.get(VAE_VARIABLE):
            return self._pictures
        return PictureTranslator(self.model, need_codec(self.model.config, self.model.device)[0])


def _given(value: Any) -> bool:
    """Whether a cell holds something: a table has None or NaN where a row leaves a column out."""
    return value is not None and not (isinstance(value, float) and value != value)


def _picture(text: str, name: str) -> Image.Image:
    """An upright picture from base64, with or without `data:image/png;base64,` before it."""
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return upright(picture)
    # A damaged picture can make a decoder raise nearly anything, and all of it means the same.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise RaystarError(f"{name}: expected a picture as base64, found {len(text)} characters: {reason}") from None


def _latent(value: Any, name: str) -> Tensor:
    """[1,4,H,W] of nested lists or arrays."""
    try:
        array = np.stack([np.stack([np.asarray(row, np.float32) for row in channel]) for channel in value])
    except (ValueError, TypeError) as error:
        raise RaystarError(f"{name}: expected numbers [channels][rows][columns]: {error}") from None
    return torch.from_numpy(array)[None]
