"""Engines by type; heavy backends are imported only when chosen."""

from __future__ import annotations

from dataclasses import replace

from rlaif.config import LabelerConfig, LabelerType
from rlaif.engines.base import Engine
from rlaif.records import UserError

__all__ = ["build_labeler"]


def build_labeler(config: LabelerConfig, seed: int) -> Engine:
    """The engine that a labeler configuration describes.

    Raises:
        UserError: if the model, server or key that it needs is missing.
    """
    # Checks it again: a type that was assigned as a text would be taken for none of those below.
    config = replace(config)
    if config.type is None:
        raise UserError("labeler is not set: give labeler=hf, labeler=vllm, labeler=openai or labeler=scripted")
    if config.type is LabelerType.scripted:
        from rlaif.engines.scripted import ScriptedEngine

        return ScriptedEngine(config.scripted, seed=seed)
    if not config.model:
        raise UserError(f"labeler.model is not set: name the model that labeler={config.type.value} uses")
    if config.type is LabelerType.openai:
        from rlaif.engines.openai import OpenAIEngine

        return OpenAIEngine(config, seed=seed)
    if config.type is LabelerType.vllm:
        from rlaif.engines.vllm import VLLMEngine

        return VLLMEngine(config)
    from rlaif.engines.hf import HFEngine

    return HFEngine(config)
