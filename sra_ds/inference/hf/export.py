"""A run's model as a folder that transformers opens, offline and without this package.

    config.json generation_config.json                  sizes, choices, ids of special tokens
    model.safetensors                                   the tensors of the checkpoint, in float32
    tokenizer.json tokenizer_config.json                the tokenizer; it opens a text with <|endoftext|>
    configuration_sra.py modeling_sra.py                the model in plain torch (`sra_ds/inference/hf/`)

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder)

Writing it does not need transformers. A part of the recipe that the model file does not know is an error,
and so is a setting: a model that computes something else would look like a good export.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

from sra_ds.config import Recipe
from sra_ds.config.base import Part
from sra_ds.config.model import (
    AttentionConfig,
    CosineRouterConfig,
    DenseChannelConfig,
    GeluConfig,
    GhostsConfig,
    HashRouterConfig,
    LinearRouterConfig,
    ModelConfig,
    MoEChannelConfig,
    NoCouplingConfig,
    NoMemoryConfig,
    RandomRouterConfig,
    SwigluConfig,
    TiedHeadConfig,
    TokenEmbeddingConfig,
)
from sra_ds.data.tokenizer import END_OF_TEXT, end_of_text_id
from sra_ds.errors import ConfigError
from sra_ds.inference.load import LoadedRun
from sra_ds.storage.run_dir import RunDir, complete_or_absent

UNTOLD = {"backend", "expert_kind", "expert_heads", "coupling", "compare_outputs", "ghosts"}
"""Settings of a channel that say nothing of an exported model."""
SOURCES = ("configuration_sra.py", "modeling_sra.py")
ROUTER = "kind gate noise"
KNOWN: dict[Any, set[str]] = {
    part: set(fields.split())
    for part, fields in {
        ModelConfig: "width layers embedding mixer channel memory head document_boundaries",
        NoMemoryConfig: "kind",
        TokenEmbeddingConfig: "kind dropout",
        AttentionConfig: "kind heads rope_theta dropout",
        DenseChannelConfig: "kind feed_forward",
        MoEChannelConfig: "kind experts top_k expert shared_expert routed_scale router backend "
        "expert_kind expert_heads coupling compare_outputs ghosts",
        NoCouplingConfig: "kind",
        GhostsConfig: "count background",
        GeluConfig: "kind hidden bias dropout",
        SwigluConfig: "kind hidden dropout",
        CosineRouterConfig: f"{ROUTER} temperature initial_temperature anchors",
        LinearRouterConfig: f"{ROUTER} bias",
        RandomRouterConfig: f"{ROUTER} temperature",
        HashRouterConfig: "kind",
        TiedHeadConfig: "kind chunk_tokens",
    }.items()
}
"""Parts and settings that `modeling_sra.py` computes, or that have no effect on what a model computes."""
ABSENT = {"expert_kind": "ffn", "count": 0}
"""The one value it knows of these."""


def export_hf(loaded: LoadedRun, out: Path) -> dict[str, Any]:
    """Write the folder; returns what is in it. Raises `ConfigError` for a model that `modeling_sra.py`
    does not know."""
    require_known(loaded.recipe.model, "model")
    tensors = {new_name(name): tensor for name, tensor in loaded.model.state_dict().items()}
    with complete_or_absent(RunDir(out)) as new:
        weights = new.path / "model.safetensors"
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, weights, {"format": "pt"})
        weights.chmod(0o644)  # readable by others, as the rest
        for name, content in (
            ("config.json", model_config(loaded)),
            ("generation_config.json", generation_config(loaded)),
            ("tokenizer_config.json", tokenizer_config(loaded.recipe)),
        ):
            (new.path / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        opened_by_mark(loaded.run.tokenizer_file).save(str(new.path / "tokenizer.json"))
        for name in SOURCES:
            source = resources.files("sra_ds.inference.hf") / name
            (new.path / name).write_text(source.read_text("utf-8"), "utf-8")
    return {
        "out": str(out),
        "checkpoint": loaded.checkpoint.name,
        "tensors": len(tensors),
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "files": sorted(path.name for path in out.iterdir()),
    }


def require_known(part: Part, path: str) -> None:
    """Raise `ConfigError` for a part or a setting that the exported model does not know."""
    fields = KNOWN.get(type(part))
    if fields is None:
        kind = getattr(part, "kind", type(part).__name__)
        raise ConfigError(
            f"{path}: a model with {kind} parts cannot be exported to transformers yet"
        )
    for name in type(part).model_fields:
        known = name in fields and getattr(part, name) == ABSENT.get(name, getattr(part, name))
        if not known:
            raise ConfigError(
                f"{path}.{name}: models with it cannot be exported to transformers yet"
            )
        value = getattr(part, name)
        if isinstance(value, Part):
            require_known(value, f"{path}.{name}")


def new_name(name: str) -> str:
    """The exported model has no modules that only group others."""
    for inner, outer in (
        (".channel.moe.", ".channel."),
        (".backend.", "."),
        (".feed_forward.", "."),
    ):
        name = name.replace(inner, outer)
    return name


def model_config(loaded: LoadedRun) -> dict[str, Any]:
    """`config.json`."""
    model, end = loaded.recipe.model, end_of_text_id(loaded.tokenizer)
    assert isinstance(model.mixer, AttentionConfig)  # or `require_known` had refused it
    channel = model.channel.model_dump(mode="json", exclude=UNTOLD)
    if loaded.model.routers():
        channel["top_k"] = loaded.model.routers()[0].top_k
    return {
        "architectures": ["SraForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sra.SraConfig",
            "AutoModelForCausalLM": "modeling_sra.SraForCausalLM",
        },
        "model_type": "sra",
        "dtype": "float32",
        "vocab_size": loaded.recipe.data.tokenizer.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.mixer.heads,
        "rope_theta": model.mixer.rope_theta,
        "max_position_embeddings": loaded.recipe.data.sequence_length,
        "embedding_dropout": model.embedding.dropout,
        "attention_dropout": model.mixer.dropout,
        "tie_word_embeddings": True,
        "channel": channel,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "exported_from": {
            "run": loaded.run.path.resolve().name,
            "recipe": loaded.recipe.name,
            "step": loaded.trainer["step"],
        },
    }


def generation_config(loaded: LoadedRun) -> dict[str, Any]:
    """`generation_config.json`; ids without a token in the tokenizer are never drawn."""
    end, entries = end_of_text_id(loaded.tokenizer), loaded.tokenizer.get_vocab_size()
    unused = list(range(entries, loaded.recipe.data.tokenizer.vocab_size))
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return {**ids, "suppress_tokens": unused} if unused else ids


def tokenizer_config(recipe: Recipe) -> dict[str, Any]:
    """`tokenizer_config.json`; the mark inside a text is text, and text comes back as it was."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": recipe.data.sequence_length,
    }


def opened_by_mark(file: Path) -> Tokenizer:
    """The tokenizer of a run, which now puts the mark that opens every document before a text."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    mark = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, end_of_text_id(tokenizer))],
    )
    own = tokenizer.post_processor
    tokenizer.post_processor = mark if own is None else processors.Sequence([own, mark])
    return tokenizer
