"""A hook of the documentation site: formulas in fences ``math`` become MathML, so that a page needs no script."""

from typing import Any

from latex2mathml.converter import convert


def formula(source: str, language: str, class_name: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """The HTML of a formula, as ``pymdownx.superfences`` asks for it."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_config(config: Any) -> Any:
    """Called by mkdocs once it has read its configuration."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config
