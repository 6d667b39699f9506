"""The plugin for the Hugging Face Hub: ``hf://org/name``, on huggingface.co and on servers that speak its API."""

from __future__ import annotations

__all__: list[str] = []
