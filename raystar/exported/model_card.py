"""The model card: what an exported model is, how it was made, how good it is, how to use it and what it cannot do."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

from raystar import __version__
from raystar.base.metrics import METRICS, OF_0_1, measured_by_0_1
from raystar.config.schema import Config

_CARD = {name: metric.card for name, metric in METRICS.items() if metric.card}
_REFERENCES = {
    "nothing": "the untouched sources",
    "transfer": "the sources with their references' channel means and deviations",
}


def versions() -> dict[str, str]:
    """Of what made a model."""
    return {"raystar": __version__, "torch": version("torch"), "python": platform.python_version()}


def card(config: Config, facts: Mapping[str, Any], files: Collection[str]) -> str:
    """The card as Markdown.

    Args:
        config: of the model.
        facts: what `metrics.json` says: `trial`, `epoch`, and what is known of `sweep`, `metric`, `mode`, `score`,
            `metrics`, `params`, `run_id`, `data`, `baseline`, `finals`, `references`, `standing`, `trials`,
            `versions`, `git_commit` and `onnx`.
        files: names of the export's files.
    """
    parts = [
        f"# {facts.get('sweep', 'raystar')}: {facts.get('trial', 'a trained model')}",
        _what(config),
        "![Sources down, references across](grid.png)" if "grid.png" in files else "",
        "![From one style of each domain to another](interpolation.png)" if "interpolation.png" in files else "",
        _trained(config, facts),
        _scores(facts),
        _use(config, facts, files),
        _limits(config, measured_by_0_1(facts.get("metrics") or {})),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(config: Config) -> str:
    domains = config.data.domains
    return (
        f"A latent StarGAN v2 between {', '.join(domains)}: it translates a picture into each of these "
        f"{len(domains)} domains, in the style of a reference picture or of a noise. It works on unscaled "
        f"{config.model.latent_channels}-channel latents of Stable Diffusion 1.5's VAE, an eighth of the picture "
        "along each side." + (" What it makes is added to the picture." if config.model.residual else "")
    )


def _trained(config: Config, facts: Mapping[str, Any]) -> str:
    training = config.training
    epoch = facts.get("epoch")
    lines = [f"Trained for {epoch if epoch is not None else 'an unknown number of'} epochs of up to {training.epochs}"]
    lines[0] += f", batch size {training.batch_size}, seed {training.seed}."
    if training.ema_epochs:
        lines.append(
            f"Its weights are averages over training, with a half-life of up to {training.ema_epochs:g} epochs."
        )
    if data := facts.get("data"):
        lines.append(f"Data: `{data['name']}`, {data['latents']} latents, digest `{data['digest']}`.")
    if facts.get("sweep") and facts.get("trials"):
        lines.append(f"Sweep `{facts['sweep']}`: one of {facts['trials']} trials; MLflow run `{facts.get('run_id')}`.")
    made = [f"{name} {number}" for name, number in (facts.get("versions") or {}).items()]
    if made:
        commit = facts.get("git_commit")
        lines.append(f"Made with {', '.join(made)}" + (f", commit `{commit[:12]}`." if commit else "."))
    text = "## How it was trained\n\n" + "\n".join(f"- {line}" for line in lines)
    if params := facts.get("params"):
        listed = "\n".join(f"- `{key}`: {value}" for key, value in params.items())
        text += f"\n\nOf what the sweep varied, it has:\n\n{listed}"
    return text + "\n\nAll of the configuration is in `config.yaml`."


def _scores(facts: Mapping[str, Any]) -> str:
    found = facts.get("metrics") or {}
    old = measured_by_0_1(found)
    meanings = {**_CARD, **OF_0_1} if old else _CARD
    shown = [(key.partition("/")[2], found[key], words) for key, words in meanings.items() if key in found]
    rows = [f"| {name} | {value:.4f} | {words} |" for name, value, words in shown]
    if not rows:
        return ""
    what = "held-out latents" if old else "decoded translations of held-out pictures"
    ruler = (
        "the ruler of raystar 0.1, whose scores cannot be compared with those of later versions"
        if old
        else "a ruler that is the same for every trial on the same data"
    )
    text = (
        f"## How good it is\n\nMeasured on {what} that training never saw, at the exported epoch, by {ruler}:\n\n"
        "| measure | value | meaning |\n|---|---|---|\n"
    )
    text += "\n".join(rows)
    known = {name: value for name, value in (facts.get("references") or {}).items() if name in _REFERENCES}
    if known:
        said = " and ".join(f"{_REFERENCES[name]} {value:.4f}" for name, value in known.items())
        text += f"\n\nWithout any model, the score of {said}."
        if facts.get("standing"):
            text += f" {facts['standing']}."
    score, baseline = facts.get("score"), facts.get("baseline")
    if isinstance(score, float) and facts.get("metric") not in (None, "eval/score"):
        text += f"\n\nThe sweep looked for the best {facts['metric']}; here {score:.4f}."
    if line := facts.get("finals"):  # one seed's score beside another's is partly luck
        text += f"\n\nOver several seeds: {line}."
    elif isinstance(score, float) and baseline and isinstance(baseline.get("score"), float):
        if baseline["trial"] == facts.get("trial"):
            text += "\n\nIt is the sweep's baseline: the configuration as it stands."
        else:
            gain = (score - baseline["score"]) / max(abs(baseline["score"]), 1e-12)
            better = gain < 0 if facts.get("mode", "min") == "min" else gain > 0
            name = str(facts.get("metric", "score")).rpartition("/")[2]
            text += (
                f"\n\nThe configuration as it stands ({baseline['trial']}) has {name} {baseline['score']:.4f}: this "
                f"model is {abs(gain):.1%} {'better' if better else 'worse'}."
            )
    return text


def _use(config: Config, facts: Mapping[str, Any], files: Collection[str]) -> str:
    domain = config.data.domains[-1]
    text = (
        "## How to use it\n\nPictures in, pictures out:\n\n```\n"
        f"python -m raystar.translate --model this_folder --input photo.jpg --domain {domain} --out translated\n"
        "```\n\nLatents, in Python:\n\n```python\nimport raystar.export\n\n"
        'model = raystar.export.load("this_folder")\n'
        f'out = model.translate(latents, "{domain}", seed=0)  # [B,{config.model.latent_channels},H,W], unscaled\n'
        f'out = model.translate(latents, "{domain}", reference=a_latent_of_that_domain)\n```'
    )
    if "generator.onnx" in files:
        agreement = facts.get("onnx", {}).get("difference")
        text += (
            "\n\nWithout PyTorch and raystar, by the ONNX files"
            + (f" (they agree with PyTorch to {agreement:.1e} of the largest value)" if agreement is not None else "")
            + ":\n\n```python\nimport numpy as np\nimport onnxruntime\n\n"
            'mapping, generator = (onnxruntime.InferenceSession(f"this_folder/{name}.onnx") for name in ("mapping", '
            '"generator"))\n'
            f"noise = np.random.default_rng(0).standard_normal((1, {config.model.latent_dim}), dtype=np.float32)\n"
            f"domain = np.array([{config.data.domains.index(domain)}])  # {', '.join(config.data.domains)}\n"
            '(style,) = mapping.run(None, {"noise": noise, "domain": domain})\n'
            '(out,) = generator.run(None, {"latents": latents, "style": style})  '
            f"# [1,{config.model.latent_channels},H,W] float32, unscaled\n```\n\n"
            "`style_encoder.onnx` takes `reference` and `domain` to the style of a reference."
        )
    return text


def _limits(config: Config, old_ruler: bool) -> str:
    things = "colours, contrasts, textures and layouts, not things and not beauty"
    sees = "latents, not pictures" if old_ruler else things
    return (
        "## What it cannot do\n\n"
        f"- It knows {', '.join(config.data.domains)} and pictures like those that it was trained on; of anything "
        "else it makes something, not necessarily something good.\n"
        "- It was trained on latents of one size. Others work, and the further they are from it the less the "
        "scores above say.\n"
        f"- The ruler sees {sees}: look at the grid before you rely on a number.\n"
        "- Latents of another autoencoder than Stable Diffusion 1.5's are noise to it.\n"
        "- It has whatever rights and biases its training pictures have."
    )
