"""LLaMA-Factory's templates that Axolotl has under a name of its own."""

from __future__ import annotations

_NO_SYSTEM = "It takes no system message; LLaMA-Factory puts one before the first turn."
_LATE_SYSTEM = "A system message goes before the last turn, not the first."

#: template -> (chat_template, what differs). Those that say nothing render the same conversation
#: as the same text, white space around a message aside (the host's Llama 3 and Gemma trim it).
TEMPLATES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("chatml", "yi", "smollm", "qwen3_nothink"), ("chatml", "")),
    "qwen": ("qwen_25", ""),
    "falcon_h1": ("falcon_h1", ""),
    "llama3": ("llama3", ""),
    "llama4": ("llama4", ""),
    "phi": ("phi_35", ""),
    "gemma": ("gemma", _NO_SYSTEM),
    "gemma2": ("gemma", _NO_SYSTEM),
    "gemma3": ("gemma3", ""),
    "ministral": ("mistral_v3_tekken", _LATE_SYSTEM),
    "mistral": ("mistral_v2v3", _LATE_SYSTEM),
}

#: Where the name says nothing to the host: the one that the model was made with.
OWN = "tokenizer_default"
