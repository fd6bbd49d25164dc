"""A hook of the documentation site: long names in code may be split at their joints, so that no word is."""

import re
from typing import Any

_CODE = re.compile(r"<pre.*?</pre>|(?<=<code>)[^<]+(?=</code>)", re.DOTALL)
_JOINT = re.compile(r"(::|[_/.,=(\[])(?=\w)")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    return _CODE.sub(lambda code: code[0] if code[0].startswith("<pre") else _JOINT.sub(r"\1<wbr>", code[0]), html)
