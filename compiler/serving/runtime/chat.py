"""A chat in the model's own form: its template, which came with the model, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

import jinja2.ext
import jinja2.sandbox


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, around what a training learns: what is in between."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

    def inside(self, caller: Any) -> Any:
        return caller()


def rendered(template: str, messages: Sequence[Any], tokens: Mapping[str, str]) -> str:
    """What `template` makes of the messages, up to where the answer begins; ValueError where it refuses them.

    As for transformers, a token that the model has not is undefined, and tools and documents are none.
    """
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **tokens}
    try:
        return compiled(template).render(messages=messages, **given)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"messages: the chat template refuses them: {error}") from None


@lru_cache(maxsize=1)
def compiled(template: str) -> jinja2.Template:
    """With what Hugging Face gives its templates."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox.from_string(template)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
