"""The model card of a `.shd` file: metadata that the Hub reads, what the file holds, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shiradelta.errors import printable
from shiradelta.io.reader import Delta
from shiradelta.util import text
from shiradelta.util.optional import importing

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A sparse weight delta of {{ base }}, in the [`.shd` format](https://github.com/shiradelta/shiradelta). It changes
{{ share }} of the weights that it names, and is taken out of the model again bit for bit.

| | |
|---|---|
{% for name, value in rows %}| {{ name }} | {{ value }} |
{% endfor %}
## Use

```bash
pip install 'shiradelta[hub]'
```

```python
import shiradelta as sd

swap = sd.load(model, "{{ place }}", strength=1.0)  # model: {{ base_words }}, as you load it
swap["{{ name }}"] = 0.5  # another strength
swap.revert()  # the base again, bit for bit
```

```bash
shiradelta apply {{ base_place }} {{ place }} -o patched  # a patched copy of the model's folder
```
"""

#: Metadata of a file that the card shows, by what they are called there; spec/REGISTRY.md says what each is.
_SHOWN = {
    "source": "made from",
    "method": "method",
    "sparsity": "share of weights asked for",
    "energy_kept": "share of the update's energy kept",
    "exactness": "exactness",
    "gain_kept": "share of the fine-tune's gain kept",
    "agreement_kept": "share of the way to the fine-tune",
    "skipped": "tensors of the source that it lacks",
    "distance_measure": "distance from the fine-tune",
    "distance": "with the delta",
    "distance_topk": "with plain top-k",
    "distance_base": "without it",
    "distance_old_delta": "with the old delta as it was",
    "old_base": "made from a delta for",
    "loss_measure": "loss",
    "loss": "loss with the delta",
    "loss_base": "loss without it",
    "loss_tuned": "loss of the fine-tune",
    "fit_texts": "texts fitted on",
    "fit_generated": "texts fitted on that the fine-tune generated",
    "fit_steps": "steps of the fit",
    "fit_mask": "mask of the fit",
    "mask": "mask",
    "examples": "examples trained on",
    "steps": "steps of training",
    "seed": "seed",
    "fit_seed": "seed of the fit",
    "created_by": "made by",
}


@dataclass(frozen=True)
class About:
    """What is said of a file that is not in it.

    Attributes:
        repo: `user/repo`.
        file: the file's name there.
        base: the base's id on the Hub, or None.
        base_revision: the commit or branch of the base, or None.
        license: an identifier as the Hub takes it, or None.
        tags: further tags.
    """

    repo: str
    file: str
    base: str | None
    base_revision: str | None
    license: str | None
    tags: Sequence[str]


def model_card(delta: Delta, about: About) -> str:
    """The card, README.md.

    Args:
        delta: the open file.
        about: what else is said of it.

    Raises:
        MissingDependencyError: huggingface_hub or jinja2 is not installed.
    """
    with importing("a model card"):
        import jinja2  # noqa: F401  which huggingface_hub uses
        from huggingface_hub import ModelCard, ModelCardData
    head: dict[str, Any] = {
        "base_model": about.base,
        "base_model_relation": None if about.base is None else "adapter",
        "base_model_revision": about.base_revision,
        "library_name": "shiradelta",
        "license": about.license,
        "tags": ["shiradelta", "sparse-delta", *about.tags],
    }
    base = delta.metadata.get("base") if about.base is None else about.base
    words = "its base" if base is None else base
    linked = f"[{about.base}](https://huggingface.co/{about.base})"
    numel = sum(tensor.numel for tensor in delta.values() if not tensor.operation.creates)
    changed = sum(tensor.nnz for tensor in delta.values() if not tensor.operation.creates)
    card = ModelCard.from_template(
        ModelCardData(**{key: value for key, value in head.items() if value is not None}),
        template_str=_TEMPLATE,
        title=_plain(about.repo.rpartition("/")[2]),
        base=_plain(words) if about.base is None else linked,
        base_words=printable(words),
        base_place=about.base or "MODEL",
        share=text.percent(changed / max(numel, 1)),
        rows=[(name, _plain(value)) for name, value in _rows(delta, about).items()],
        place=f"{about.repo}/{about.file}",
        name=about.file.rpartition("/")[2].removesuffix(".shd"),
    )
    return str(card)


def _rows(delta: Delta, about: About) -> Mapping[str, str]:
    """What the card's table says."""
    codecs = sorted({tensor.record.value_codec_name for tensor in delta.values() if tensor.nnz})
    dtypes = sorted({tensor.dtype for tensor in delta.values()})
    revision = {} if about.base_revision is None else {"revision of the base": about.base_revision}
    return {
        "file": f"{about.file}, {text.size(delta.sizes['file'])}",
        "content digest": delta.digest,
        **revision,
        "tensors": f"{len(delta):,} ({', '.join(dtypes)})",
        "nonzeros": f"{delta.nnz:,}, {delta.sizes['file'] * 8 / max(delta.nnz, 1):.2f} bits each",
        "values": ", ".join(codecs) or "none",
        **{name: delta.metadata[key] for key, name in _SHOWN.items() if key in delta.metadata},
    }


def _plain(value: str) -> str:
    """A text in Markdown in which nothing is markup."""
    short = text.brief(value)
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#|!~$" else c for c in short)
